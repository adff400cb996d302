"""The formula of memory, on sizes whose parts were computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lm_envs.benchmarks.run.memory import ALLOCATOR, BASE, Shape, Sizes, advice, memory, size

SHAPE = Shape(1000, layers=2, width=10, matrices=100, products=30, widest=20, keys=8, vocabulary=50, largest=300)
SIZES = Sizes(
    policy=SHAPE,
    own=1000,
    trained=1000,
    trained_layers=2,
    others=4000,
    rewards=(Shape(500),),
    prompt=3,
    new=5,
    rows=4,
    measured=2,
    batch=2,
)


def test_every_part_by_hand():
    found = memory(SIZES)
    assert found.lasting == {
        "python and torch": BASE,
        "policy": 4000,
        "reference": 4000,
        "reward models": 2000,
        "value model": 0,
        "gradients": 4000,
        "Adam": 8000,
    }
    # 4 rows of 3 + 16 columns (the room of a buffer), 8 keys and values, 4 bytes; two layers hold them
    caches = 4 * 19 * 8 * 4
    assert found.phases == {
        "sampling": {"key and value caches": 2 * caches, "activations": caches + 4 * 50 * 8},
        # 4 texts of 8 tokens: twice the width and three times the widest; logits and as much again
        "scoring": {"activations": 32 * 80 * 4, "vocabulary": 4 * 5 * 50 * 4 * 2},
        # 2 texts of 8 tokens keep 110 numbers in each of two layers, and backward is in one
        "update": {
            "activations": 16 * 330 * 4,
            "fragments": int(0.6 * 16 * 330 * 4),
            "vocabulary": 2 * 5 * 50 * 4 * 3,
            "a gradient under way": 1200,
        },
        "checkpoint": {"copies to write": 12_000},
    }
    assert found.peak == "update"
    held = BASE + 22_000 + 21_120 + 12_672 + 6_000 + 1_200
    assert found.total == held + int(ALLOCATOR * held)


def test_a_long_prompt_takes_more_than_a_step():
    part = memory(replace(SIZES, prompt=40)).phases["sampling"]
    columns = 40 + 40
    assert part == {"key and value caches": 2 * 4 * columns * 32, "activations": 4 * 40 * 80 * 4}


def test_bfloat16_has_master_weights_and_steps_in_float32():
    low = memory(replace(SIZES, policy=replace(SHAPE, itemsize=2), others=2000))
    assert low.lasting["policy"] == low.lasting["gradients"] == 2000 and low.lasting["Adam"] == 12 * 1000
    assert low.phases["Adam's step"] == {"gradients in float32": 4000}
    assert low.phases["checkpoint"] == {"copies to write": 14_000}
    assert low.phases["update"]["activations"] == 16 * 375 * 2


def test_float64_has_moments_of_its_own_precision():
    assert memory(replace(SIZES, policy=replace(SHAPE, itemsize=8))).lasting["Adam"] == 16_000


def test_what_is_frozen_has_no_gradient_and_keeps_nothing():
    part = replace(SIZES, own=250, trained=250, trained_layers=1)
    found = memory(part)
    assert (found.lasting["policy"], found.lasting["gradients"], found.lasting["Adam"]) == (1000, 1000, 2000)
    update = found.phases["update"]
    assert (update["activations"], update["vocabulary"], update["a gradient under way"]) == (16 * 220 * 4, 6000, 0)
    assert (part.checkpoint, part.model) == (3000, 4000) and replace(part, adapters=True).model == 1000


def test_many_logits_are_made_in_chunks_and_layers_are_computed_again():
    many = replace(SIZES, policy=replace(SHAPE, vocabulary=2**20))  # 2 * 5 * 2**20 numbers are more than 2**23
    update = memory(many).phases["update"]
    assert update["vocabulary"] == 2 * 5 * 2**20 * 4  # and fewer than a chunk has
    assert update["activations"] == 16 * (2 * (10 + 30) + 110) * 4
    assert update["fragments"] == 2 * update["activations"]
    larger = memory(replace(many, batch=8, rows=8)).phases["update"]
    assert larger["vocabulary"] == 2**25 * 4
    whole = memory(replace(many, distribution=True)).phases["update"]
    assert whole["vocabulary"] == 2 * 5 * 2**20 * 4 * 3


def test_a_value_model_is_held_trained_and_kept():
    critic = replace(SHAPE, parameters=700, vocabulary=0)
    found = memory(replace(SIZES, critic=critic, trained=1700))
    assert found.lasting["value model"] == 2800 and found.lasting["Adam"] == 1700 * 8
    assert found.phases["update"]["activations"] == 2 * 16 * 330 * 4


def test_models_are_shares_during_an_update():
    """1000 parameters, 400 of them outside two layers of 300; two processes."""
    one, two = (memory(replace(SIZES, policy=replace(SHAPE, outside=400), shares=n)) for n in (1, 2))
    assert two.lasting == {"python and torch": BASE, "Adam": 4000}
    whole = {"policy": 4000, "reference": 4000, "reward models": 2000, "value model": 0}
    cut = {name: count // 2 for name, count in whole.items()} | {"gradients": 2000}
    for phase in ("sampling", "scoring", "checkpoint"):
        assert two.phases[phase] == whole | one.phases[phase]
    assert two.phases["update"] == cut | one.phases["update"] | {"put together": 4 * (400 + 2 * 300)}
    assert two.phases["the end of backward"] == cut | {"put together": 4 * 400, "gradients to sum": 4 * 2 * 400}
    # Four processes hold half of that; of adapters nothing is large but the frozen weights beside them.
    part = memory(replace(SIZES, policy=replace(SHAPE, outside=400), own=80, trained=80, shares=4))
    update = part.phases["update"]
    assert (part.lasting["Adam"], update["policy"], update["reference"]) == (160, 80, 1000)
    assert update["put together"] == 4000 and part.phases["the end of backward"]["gradients to sum"] == 0
    assert memory(replace(SIZES, shares=2, distribution=True)).phases["update"]["reference"] == 4000


def test_shares_in_bfloat16_are_summed_in_float32():
    policy = replace(SHAPE, itemsize=2, outside=400)
    found = memory(replace(SIZES, policy=policy, shares=2))
    step = found.phases["Adam's step"]
    assert found.lasting["Adam"] == 6000 and found.phases["update"]["gradients"] == 1000
    assert (step["policy"], step["gradients"], step["gradients in float32"]) == (1000, 1000, 2000)
    assert found.phases["the end of backward"]["gradients to sum"] == 400 * (2 + 4)


def test_on_a_gpu_neither_python_nor_a_checkpoint_is_in_its_memory():
    found = memory(replace(SIZES, device="cuda"))
    assert found.lasting["python and torch"] == 0 and "checkpoint" not in found.phases
    assert found.phases["update"]["fragments"] == 0


def test_large_tensors_leave_no_fragments():
    assert memory(replace(SIZES, prompt=2**17)).phases["update"]["fragments"] > 0
    assert memory(replace(SIZES, prompt=2**18)).phases["update"]["fragments"] == 0


def test_nothing_is_trained_without_a_batch():
    found = memory(replace(SIZES, trained=0, trained_layers=0, batch=0, own=0, rows=0))
    assert sum(found.phases["update"].values()) == 0 and found.lasting["gradients"] == 0
    assert found.phases["sampling"]["key and value caches"] == 2 * 2 * 19 * 32


LARGE = replace(SIZES, policy=replace(SHAPE, parameters=10**9), own=10**9, trained=10**9, others=4 * 10**9)


@pytest.mark.parametrize(
    ("sizes", "free", "expected"),
    [
        (replace(SIZES, batch=64, prompt=10**5), 3e9, "micro_batch=16"),  # 1.5 GB, four times as much with 64
        (replace(SIZES, measured=2**10, prompt=10**5), 3e9, "16 test and validation prompts"),
        (LARGE, 12e9, "--lora-rank 16"),  # 4 GB of reference, and little of a policy
        (LARGE, 3.5e9, "micro_batch=1 and --lora-rank 16 and --dtype bfloat16"),
        (LARGE, 1e9, "a smaller model, or a machine with more memory"),
    ],
)
def test_advice_names_the_first_setting_that_is_enough(sizes, free, expected):
    assert memory(sizes).total > free and advice(sizes, free) == expected


def test_sizes_are_told_in_units():
    assert [size(x) for x in (1.25e9, 384e6, 12_300)] == ["1.25 GB", "384 MB", "12 kB"]
