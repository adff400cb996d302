"""Runs that train part of a language model: from the suite to the folder that plain transformers loads."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_envs.benchmarks.commands.compare import Compare
from lm_envs.benchmarks.commands.options import Adapt
from lm_envs.benchmarks.errors import Interrupted, UserError
from lm_envs.benchmarks.run import one_run
from lm_envs.benchmarks.run.one_run import settings_of
from lm_envs.benchmarks.run.problems import TextProblem
from lm_envs.benchmarks.run.storage import Checkpoints, Records
from lm_envs.benchmarks.run.suite_files import parse_suite
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from tests.benchmarks.fake_task import NAME
from tests.lm_envs import byo
from tests.marks import slow_unless

execute = partial(one_run.execute, keep=1)  # their last checkpoints are compared

LORA, FROZEN = {"lora_rank": 4}, {"freeze_layers": 1}
# Width 16: c_attn 16 x 48, c_proj 16 x 16, c_fc 16 x 64, c_proj 64 x 16 a layer; two layers; the value head is 17.
ADAPTERS = 2 * 4 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
LAYER = (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 2 * 32
WHOLE = 2 * LAYER + (10 + 64) * 16 + 32
SIZES = {"lora": (LORA, ADAPTERS + 17), "frozen": (FROZEN, LAYER + 32 + 17), "whole": ({}, WHOLE + 17)}
SETTINGS = {"episodes": 64, "learning_rate": 1e-2}


def spec(adaptation: dict, **changes) -> RunSpec:
    plan = Plan(iterations=12, test_prompts=20, validation_prompts=20, validate_every=4, checkpoint_every=4)
    made = {"task": NAME, "algorithm": "ppo", "seed": 0, "plan": plan, "overrides": SETTINGS, "adaptation": adaptation}
    return RunSpec(**{**made, **changes})


def tensors(out: Path, run: RunSpec) -> dict[str, torch.Tensor]:
    return Checkpoints(out / run.label / "checkpoints").newest().tensors


@pytest.mark.parametrize(
    ("algorithm", "kind"), slow_unless(("ppo", "lora").__eq__, product(["ppo", "reinforce"], SIZES))
)
def test_a_short_run_raises_the_score_and_says_what_it_trains(tmp_path, algorithm, kind):
    adaptation, trained = SIZES[kind]
    run = spec(adaptation, algorithm=algorithm)
    execute(run, tmp_path)
    points = [r for r in Records(tmp_path / run.label / "metrics.jsonl").read() if "validation_proxy" in r]
    assert points[-1]["validation_proxy"] > points[0]["validation_proxy"] + 0.5
    config = settings_of(tmp_path / run.label)
    assert config["trainable_parameters"] == trained and config["parameters"] == WHOLE
    held = sum(t.numel() for n, t in tensors(tmp_path, run).items() if n.startswith("policy."))
    assert held == trained + (160 if not adaptation else 0)  # the tied output layer is in a state_dict twice


@pytest.mark.parametrize("adaptation", slow_unless(LORA.__eq__, [LORA, FROZEN]), ids=["lora", "frozen"])
def test_interrupted_and_continued_is_the_same_run(tmp_path, adaptation):
    run = spec(adaptation)
    execute(run, tmp_path / "whole")
    asked = []
    with pytest.raises(Interrupted):
        execute(run, tmp_path / "parts", should_stop=lambda: len(asked) == 6 or asked.append(0))
    execute(run, tmp_path / "parts")
    a, b = tensors(tmp_path / "whole", run), tensors(tmp_path / "parts", run)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    with pytest.raises(UserError, match="other settings"):
        execute(spec({}), tmp_path / "whole")


def test_what_is_not_adapted_is_not_in_the_settings():
    """So that runs of earlier versions can be continued."""
    assert "adaptation" not in spec({}).to_json()
    assert RunSpec(**spec(LORA).to_json() | {"plan": spec(LORA).plan}) == spec(LORA)
    assert RunSpec(**spec({}).to_json() | {"plan": spec({}).plan}) == spec({})


SUITE = """
tasks = ["reviews", "CartPole-v1"]
algorithms = ["ppo"]
[adaptation]
lora_rank = 8
lora_targets = ["c_attn"]
"""


def test_suites_and_command_lines_say_what_is_adapted():
    runs = {run.task: run for run in parse_suite(SUITE, "mine.toml").runs()}
    assert runs["reviews"].adaptation == {"lora_rank": 8, "lora_targets": ["c_attn"]}
    assert runs["CartPole-v1"].adaptation == {}
    asked = Compare(
        out=Path("out"), task=("reviews",), algorithms=("ppo",), adapt=Adapt(lora_rank=2, lora_targets=("a",))
    )
    assert asked.to_suite().runs()[0].adaptation == {"lora_rank": 2, "lora_targets": ["a"]}
    assert Compare(out=Path("out"), task=("reviews",), algorithms=("ppo",)).to_suite().adaptation == {}
    for old, new, message in [
        ("lora_rank = 8", "lora_rnk = 8", r"line 5: adaptation has no option 'lora_rnk': did you mean 'lora_rank'"),
        ("lora_rank = 8", "lora_rank = -1", "line 5: adaptation: lora_rank must be at least 0, not -1"),
        ("lora_rank = 8", "freeze_layers = 1", "mean nothing without lora_rank"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_suite(SUITE.replace(old, new), "mine.toml")
    with pytest.raises(ValueError, match="mean nothing without lora_rank"):
        Compare(out=Path("out"), task=("reviews",), algorithms=("ppo",), adapt=Adapt(lora_alpha=2.0)).to_suite()


def test_lora_without_peft_is_told_before_anything_trains(monkeypatch):
    from lm_envs.benchmarks.run import suites

    monkeypatch.setattr(suites, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lm-envs\[lora\]'"):
        parse_suite(SUITE, "mine.toml")


@pytest.mark.parametrize(("task", "message"), [("enumerable", "is a table"), ("CartPole-v1", "for language models")])
def test_what_has_no_layers_is_refused(task, message):
    from lm_envs.benchmarks.run.problems import open_problem

    with pytest.raises(UserError, match=message):
        open_problem(spec(FROZEN, task=task, overrides={}))


def greedy(model, prompt: list[int], count: int, eos: int) -> list[int]:
    """Without transformers' generation: one whole forward per token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids


def trained_model(out: Path, run: RunSpec):
    """The policy's model as the run's last checkpoint has it, and the task."""
    problem = TextProblem(run)
    checkpoint = Checkpoints(out / run.label / "checkpoints").newest()
    weights = {n: t for n, t in checkpoint.tensors.items() if not n.startswith("rng.")}
    problem.agent.restore(weights, checkpoint.state["agent"])
    return problem.policy.model, problem.task


def check_loads(folder: Path, model, task, exact: bool) -> None:
    """Plain transformers generates what the policy does."""
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompts, different = task.prompts["test"][:8], 0
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            a, b, start = (m(input_ids=ids).logits for m in (loaded, model, task.start))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if exact else 1e-4)
        wanted = greedy(model, prompt, task.max_new_tokens, task.eos_token_id)
        found = loaded.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            eos_token_id=task.eos_token_id,
            pad_token_id=task.eos_token_id,
        )[0].tolist()
        assert found == wanted
        assert tokenizer.decode(found) == task.tokenizer.decode(wanted)
        different += not torch.allclose(b, start, atol=1e-3)
    assert different == len(prompts) > 0  # it is the tuned model, not the start


@pytest.mark.parametrize("adaptation", slow_unless(LORA.__eq__, [{}, LORA, FROZEN]), ids=["whole", "lora", "frozen"])
def test_transformers_loads_the_tuned_model(tmp_path, adaptation):
    run = spec(adaptation)
    execute(run, tmp_path)
    folder = tmp_path / run.label / "model"
    assert not (folder / "adapter_config.json").exists()  # the start has no name: adapters alone would be useless
    check_loads(folder, *trained_model(tmp_path, run), exact=adaptation is not LORA)


@pytest.mark.parametrize("merge", [False, True], ids=["adapters", "merged"])
def test_transformers_loads_the_adapters_on_the_users_model(tmp_path, merge):
    options = byo.make(tmp_path).options
    adaptation = {**LORA, "freeze_layers": 1, "lora_merge": merge}
    plan = Plan(iterations=2, test_prompts=2, validation_prompts=2)
    overrides = {"episodes": 8, "learning_rate": 1e-2}
    run = spec(adaptation, task="custom", options=options, plan=plan, overrides=overrides, env={"max_new_tokens": 6})
    execute(run, tmp_path / "out")
    folder = tmp_path / "out" / run.label / "model"
    assert (folder / "adapter_model.safetensors").exists() is not merge
    assert (folder / "model.safetensors").exists() is merge
    check_loads(folder, *trained_model(tmp_path / "out", run), exact=not merge)


def test_the_adapters_that_a_run_left_are_a_policy_for_the_next(tmp_path):
    """In bfloat16: trained further against their base, and left in peft's format again, of the same model."""
    options = byo.make(tmp_path).options
    plan = Plan(iterations=2, test_prompts=2, validation_prompts=2)
    given = {"plan": plan, "overrides": {"episodes": 8, "learning_rate": 1e-2}, "env": {"max_new_tokens": 6}}
    first = spec(LORA, task="custom", options={**options, "dtype": "bfloat16"}, **given)
    execute(first, tmp_path / "first")
    place = tmp_path / "first" / first.label / "model"
    more = {"policy": str(place), "reference": "base", "dtype": "bfloat16"}
    second = spec({}, task="custom", options={**options, **more}, **given)
    execute(second, tmp_path / "second")
    folder = tmp_path / "second" / second.label / "model"
    model, task = trained_model(tmp_path / "second", second)
    assert settings_of(tmp_path / "second" / second.label)["trainable_parameters"] < 0.5 * sum(
        p.numel() for p in task.reference.parameters()
    )
    assert (folder / "adapter_model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([task.prompts["test"][0]])
    with torch.no_grad():
        a, b, start = (m(input_ids=ids).logits.float() for m in (loaded, model, task.start))
    assert float((a - b).abs().max()) < 0.1 < float((b - start).abs().max())


def test_what_transformers_could_not_read_is_not_saved(tmp_path):
    plan = Plan(iterations=1, test_prompts=4, validation_prompts=4)
    for algorithm, overrides in (("quark", {"episodes": 16}), ("best-of-2", {})):
        run = spec({}, algorithm=algorithm, plan=plan, overrides=overrides)
        execute(run, tmp_path)
        assert not (tmp_path / run.label / "model").exists()
