"""Plans of runs: sizes from real models and from sketches of them, what is said before runs begin, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.benchmarks import cli
from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.run import planning
from lm_envs.benchmarks.run.memory import Shape, memory
from lm_envs.benchmarks.run.planning import (
    announcement,
    disk,
    free_in_container,
    free_memory,
    plan_of,
    shape_of,
    sizes_of,
)
from lm_envs.benchmarks.run.problems import open_problem
from lm_envs.benchmarks.run.sketch import sketch
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.benchmarks.run.timing import timed
from lm_envs.reward.learned import LearnedReward
from tests.benchmarks.fake_task import NAME
from tests.lm_envs import byo
from tests.tiny import gpt2

PPO = {"episodes": 8, "epochs": 3, "minibatches": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> byo.Folders:
    made = byo.make(tmp_path_factory.mktemp("byo"))
    byo.write_jsonl(made.root / "prompts.jsonl", _prompts())
    return made


def _prompts(**columns) -> list[dict]:
    splits = 4 * ("train", "validation", "test")
    return [{"prompt": text[:-2], "split": split, **columns} for text, split in zip(byo.TEXTS, splits, strict=True)]


def spec(folders: byo.Folders, algorithm: str = "ppo", **more) -> RunSpec:
    options = {**folders.options, "judge": str(folders.root / "judge"), "samples": 4, **more.pop("options", {})}
    settings = {"env": {"max_new_tokens": 5}, "overrides": PPO} | more
    return RunSpec("custom", algorithm, 0, Plan(iterations=6, validation_prompts=2, test_prompts=3), options=options,
                   **settings)  # fmt: skip


def test_the_shapes_of_two_families():
    # Two layers of width 16: attention's 16 to 48 and 16 to 16, a perceptron of 16 to 64 and back.
    assert shape_of(gpt2()) == Shape(
        sum(p.numel() for p in gpt2().parameters()), 8, 2, 16, 64 + 32 + 80 + 80, 48 + 16 + 64, 64, 32, 10, 64 * 16,
        (64 + 10 + 2) * 16,
    )  # fmt: skip
    llama = shape_of(byo.llama(300))
    # 4 query heads and 2 of keys and values, each of 4; 16 to 24 twice, and back
    assert (llama.matrices, llama.products, llama.widest, llama.keys) == (32 + 24 + 24 + 32 + 3 * 40, 80, 24, 16)
    assert (llama.itemsize, llama.vocabulary, llama.largest) == (4, 300, 300 * 16)
    classifier = shape_of(byo.bert(50))
    assert (classifier.layers, classifier.width, classifier.vocabulary) == (1, 16, 0)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"adaptation": {"freeze_layers": 1}},
        {"adaptation": {"lora_rank": 2}},
        {"options": {"dtype": "bfloat16"}},
        {"algorithm": "best-of-4", "overrides": {}},
        {"algorithm": "grpo", "overrides": {"group_size": 4, "kl_loss": "full", "episodes": 8}},
        {"options": {"reward": "bleu*0.5", "reward_model": None, "judge": None}},
    ],
)
def test_a_sketch_has_the_sizes_of_the_run(folders, change):
    if "reward" in change.get("options", {}):
        rows = _prompts(reference="the cat")
        change["options"]["prompts"] = str(byo.write_jsonl(folders.root / "with_references.jsonl", rows))
    given = spec(folders, **change)
    drawn, real = sketch(given), open_problem(given)
    assert {p.device.type for p in drawn.policy.parameters()} <= {"meta"} if drawn.agent else True
    assert sizes_of(drawn) == sizes_of(real) and plan_of(drawn).memory == plan_of(real).memory


def test_the_sizes_of_a_run(folders):
    problem = open_problem(spec(folders))
    found, policy = sizes_of(problem), problem.policy
    assert isinstance(policy, LMPolicy)
    numbers = sum(p.numel() for p in policy.parameters())
    assert (found.own, found.trained, found.trained_layers) == (numbers, numbers, 2)
    assert found.others == 4 * sum(p.numel() for p in problem.task.reference.parameters())
    assert [shape.parameters for shape in found.rewards] == [
        sum(p.numel() for p in reward.model.parameters())
        for reward in (problem.task.reward, problem.task.judge)
        if isinstance(reward, LearnedReward)
    ]
    assert (found.prompt, found.new) == (problem.task.prompt_length, 5)
    assert (found.rows, found.batch, found.measured) == (8, 4, 3)
    two = sizes_of(problem, processes=2)
    assert (two.rows, two.batch, two.measured, two.shares) == (4, 2, 2, 1)
    assert sizes_of(problem, processes=2, fsdp=True) == replace(two, shares=2)
    best = sizes_of(sketch(spec(folders, "expert-iteration", overrides={"episodes": 16, "group_size": 8, "keep": 3})))
    assert (best.rows, best.batch) == (16, 6)  # three of each group are learned from


def test_frozen_weights_and_adapters_are_the_references(folders):
    frozen = sizes_of(sketch(spec(folders, adaptation={"freeze_layers": 1})))
    assert frozen.own == frozen.trained < frozen.policy.parameters and frozen.trained_layers == 1
    assert frozen.model == frozen.policy.bytes
    adapters = sizes_of(sketch(spec(folders, adaptation={"lora_rank": 2})))
    assert adapters.trained_layers == 2 and adapters.model == 4 * adapters.own < frozen.model
    merged = sizes_of(sketch(spec(folders, adaptation={"lora_rank": 2, "lora_merge": True})))
    assert merged.model == frozen.model


def test_a_value_model_is_found(tmp_path, folders):
    problem = open_problem(RunSpec("reviews", "ppo", 0, Plan(iterations=1), overrides={"value_from": "reward_model"}))
    found = sizes_of(problem)
    critic = sum(p.numel() for p in problem.policy.critic.parameters())
    assert found.critic is not None and found.critic.parameters == critic
    assert found.trained == found.own + critic


def test_what_a_run_counts(folders):
    found = plan_of(open_problem(spec(folders)), keep=1)
    assert (found.iterations, found.texts, found.tokens(found.texts)) == (6, 48, 48 * 5)
    assert found.scored == 2 * 48 * (5 + found.sizes.prompt)  # by the reward and the reference
    critic = replace(found, sizes=replace(found.sizes, critic=found.sizes.policy))
    assert critic.scored == 3 * 48 * (5 + found.sizes.prompt)
    assert found.measured == 7 * 2 + 2 * 3  # a point before and after each iteration, and the test, twice
    assert found.checkpoint == 12 * found.trained
    assert disk([found], [found.spec, found.spec]) == (
        2 * (found.model + found.checkpoint) + 3 * found.checkpoint,
        2 * (found.model + found.checkpoint),
    )
    budget = replace(found.spec, plan=Plan(tokens=100))
    assert plan_of(open_problem(budget)).texts is None
    best = plan_of(open_problem(spec(folders, "best-of-4", overrides={})))
    assert (best.iterations, best.texts, best.checkpoint, best.measured) == (0, 0, 0, 3 * (1 + 4))


@pytest.mark.parametrize(
    ("task", "algorithm"), [("CartPole-v1", "ppo"), ("enumerable", "ppo"), ("enumerable", "best-of-2")]
)
def test_policies_that_are_no_language_models_are_small(task, algorithm):
    options = {"tokens": 3, "horizon": 3} if task == "enumerable" else {}
    found = plan_of(open_problem(RunSpec(task, algorithm, 0, Plan(iterations=2), options=options)))
    assert found.iterations == (2 if algorithm == "ppo" else 0) and 0 < found.memory.total < 700e6


def test_what_is_said_before_runs_begin(folders, monkeypatch):
    found = plan_of(open_problem(spec(folders)))
    assert list(announcement([found], [found.spec], 1)) == [
        "disk: up to 531 kB while training (checkpoints of 159 kB), 53 kB when finished"
    ]
    monkeypatch.setattr(planning, "free_memory", lambda device: 6e8)
    _, warning = announcement([found], [found.spec], 2)
    assert (
        warning.startswith("warning: memory: custom/ppo takes about 2 processes of 5") and "600 MB are free" in warning
    )
    assert "fewer --jobs or --processes" in warning


def test_free_memory_is_what_the_system_says():
    assert 1e8 < free_memory() < 1e14


def test_a_container_has_what_its_limit_leaves(tmp_path):
    assert free_in_container(tmp_path) == planning.UNKNOWN
    for name, text in (("max", "max\n"), ("current", "700\n"), ("stat", "anon 500\ninactive_file 150\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_in_container(tmp_path) == planning.UNKNOWN
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_in_container(tmp_path) == 1000 - 700 + 150


def test_timing_changes_no_weight_and_holds_no_moments(folders, monkeypatch):
    problem = open_problem(spec(folders))
    before = {name: p.clone() for name, p in problem.policy.named_parameters()}
    seen: list[int] = []
    iteration = problem.agent.iteration
    monkeypatch.setattr(
        problem.agent, "iteration", lambda env: (seen.append(problem.agent.config.epochs), iteration(env))[1]
    )
    plan = timed(problem, plan_of(problem))
    assert seen == [1, 1, 1] and all(torch.equal(before[n], p) for n, p in problem.policy.named_parameters())
    assert not problem.agent.optimizer.state
    each, whole = plan.seconds
    assert 0 < each and 6 * each < whole


def test_three_passes_count_three_times(folders, monkeypatch):
    problem = open_problem(spec(folders))
    given = iter([(9.0, 9.0), (2.0, 0.5), (4.0, 0.5)])

    def iteration(env):
        sample, update = next(given)
        return None, {"sample_s": sample, "update_s": update}

    monkeypatch.setattr(problem.agent, "iteration", iteration)
    assert timed(problem, plan_of(problem)).seconds[0] == pytest.approx((2 + 1.5 + 4 + 1.5) / 2, abs=0.1)


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path, folders, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [f"--{name.replace('_', '-')}={place}" for name, place in folders.options.items()]
    words += ["--iterations", "2", "--set", "episodes=4", "--env", "max_new_tokens=5"]
    main(["plan", "train", "--algorithm", "ppo", *words, "--no-timing", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["runs"], found["at_once"], found["fits"], found["advice"]) == (1, 1, True, None)
    (plan,) = found["plans"]
    assert plan["tokens_sampled"] == 2 * 4 * 5 and plan["seconds"] is None
    assert plan["memory"] == sum(plan["parts"].values()) and found["disk_most"] > plan["checkpoint"]
    main(["plan", "compare", "--task", NAME, "--algorithms", "sft", "ppo", "--seeds", "0", "1", "--iterations", "2",
          "--jobs", "2", "--threads", "1", "--no-timing"])  # fmt: skip
    said = capsys.readouterr().out
    assert "4 runs, 2 at once" in said and "reviews" not in said and "activations" in said
    assert list(Path().iterdir()) == []


def test_a_plan_of_many_processes_starts_them_to_time_it(folders, monkeypatch, capsys):
    monkeypatch.setattr(cli, "launch", lambda words, count: 70 + count)
    words = [f"--{name.replace('_', '-')}={place}" for name, place in folders.options.items()]
    words = ["plan", "train", "--algorithm", "ppo", *words, "--processes", "2", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 72
    parts = []
    for more in ([], ["--fsdp"]):
        main([*words, "--no-timing", *more])
        found = json.loads(capsys.readouterr().out)
        parts.append(found["plans"][0]["parts"])
        assert found["at_once"] == 2
    assert parts[0]["Adam"] == 2 * parts[1]["Adam"] > 0 and "gradients" in parts[0]


def test_a_plan_that_does_not_fit_reads_no_weights_and_says_what_to_change(folders, monkeypatch, capsys):
    monkeypatch.setattr(planning, "free_memory", lambda device="cpu": 5e8)
    words = [f"--{name.replace('_', '-')}={place}" for name, place in folders.options.items()]
    main(["plan", "train", "--algorithm", "ppo", *words, "--iterations", "2"])
    said = capsys.readouterr().out
    assert "so it may be killed; try " in said and "500 MB are free" in said
    assert memory(sizes_of(sketch(spec(folders)))).total > 5e8


def test_a_run_that_may_not_fit_is_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "free_memory", lambda device: 5e8)
    words = ["train", "--task", NAME, "--algorithm", "ppo", "--iterations", "1", "--set", "episodes=4"]
    main([*words, "--env", "max_new_tokens=3", "--threads", "1", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert said.count("warning: memory:") == 1 and "500 MB are free" in said
    assert said.count("disk: up to") == 1


def test_a_plan_refuses_what_a_run_would(folders, capsys):
    words = [f"--{name.replace('_', '-')}={place}" for name, place in folders.options.items()]
    for more, why in ((["--device", "cuda:9"], "device 'cuda:9' cannot be used"), (["--set", "episode=3"], "episodes")):
        with pytest.raises(SystemExit):
            main(["plan", "train", "--algorithm", "ppo", *words, *more, "--no-timing"])
        said = capsys.readouterr().err
        assert why in said and "Traceback" not in said
