"""Every number of a result is computed here a second time, from the saved model and the texts, by other code.

What is taken from the project is the uniform numbers alone (they have known answers in tests/lm_envs/test_rng.py); the
sampling, the scores, the log-probabilities and the statistics are written out.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_envs import rng
from lm_envs.benchmarks.errors import Interrupted
from lm_envs.benchmarks.run.one_run import execute
from lm_envs.benchmarks.run.results import collect_results, table, write_csv
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from tests.benchmarks import distinct_task as task
from tests.tiny import EOS, WORDS

POLICY, REFERENCE = 1 << 40, 1 << 41  # the seeds that evaluation adds the run's to, and that of the SFT side
NEW = 6
N = 4
TRAINED = {"learning_rate": 3e-2, "episodes": 32}
PLAN = Plan(episodes=100, test_prompts=None, validation_prompts=24, validate_every=1, checkpoint_every=1)


def spec(algorithm: str, seed: int, log: Path) -> RunSpec:
    trained = algorithm not in ("sft", f"best-of-{N}")
    options, off = {"log": str(log)}, {"action": "off"}  # it learns as it can, and collapses by the guards
    return RunSpec(task.NAME, algorithm, seed, PLAN, {}, options, TRAINED if trained else {}, guards=off)


@dataclass
class Run:
    """What one run left."""

    spec: RunSpec
    folder: Path
    result: dict
    log: list[dict]

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().split("\n") if line]

    @property
    def test_samples(self) -> list[dict]:
        return [record for record in self.lines("samples.jsonl") if record["split"] == "test"]

    @property
    def model(self):
        if self.spec.algorithm != "reinforce":
            return task.load().reference
        return AutoModelForCausalLM.from_pretrained(self.folder / "model").eval()

    def scored(self, split: str) -> tuple[int, int]:
        """Texts of a split that the reward saw, and their tokens."""
        word = WORDS[task.FIRST[split]]
        seen = [n for line in self.log for s, n in zip(line["splits"], line["tokens"], strict=True) if s == word]
        return len(seen), sum(seen)


def execute_twice(run: RunSpec, out: Path) -> None:
    """Stopped after its second iteration, and resumed."""
    stop = iter([False, True])
    with pytest.raises(Interrupted):
        execute(run, out, should_stop=lambda: next(stop))
    execute(run, out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[tuple[str, int], Run]]:
    out, logs = tmp_path_factory.mktemp("recomputed"), tmp_path_factory.mktemp("logs")
    found = {}
    for algorithm, seed in [("sft", 3), (f"best-of-{N}", 3), ("reinforce", 3), ("reinforce", 4)]:
        log = logs / f"{algorithm}-{seed}"
        run = spec(algorithm, seed, log)
        if seed == 4:
            execute_twice(run, out)
        else:
            execute(run, out)
        folder = out / run.folder
        lines = [json.loads(line) for line in log.read_text().split("\n") if line]
        found[algorithm, seed] = Run(run, folder, json.loads((folder / "result.json").read_text()), lines)
    return out, found


@torch.no_grad()
def logits_of(model, rows: list[list[int]]) -> torch.Tensor:
    """``(N, L, V)`` of rows of one length, plainly."""
    return model(torch.tensor(rows)).logits.double()


def sampled(model, prompts: list[list[int]], seed: int, first: int = 0, per_prompt: int = 1, skip: int = 0):
    """Responses by inverse CDF, all rows of one length a token at a time; ended rows are carried along and cut."""
    episodes = first + np.arange(len(prompts))
    uniforms = rng.uniform(seed, rng.TOKEN, episodes[:, None], np.arange(NEW * per_prompt))
    uniforms = uniforms[:, skip * NEW : (skip + 1) * NEW]
    rows = [list(prompt) for prompt in prompts]
    for t in range(NEW):
        p = torch.softmax(logits_of(model, rows)[:, -1], dim=-1).numpy()
        chosen = (np.cumsum(p, axis=1) <= uniforms[:, t : t + 1]).sum(axis=1)
        rows = [[*row, min(int(c), p.shape[1] - 1)] for row, c in zip(rows, chosen, strict=True)]
    cut = []
    for row, prompt in zip(rows, prompts, strict=True):
        response = row[len(prompt) :]
        cut.append(response[: response.index(EOS) + 1] if EOS in response else response)
    return cut


def text_of(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids if i != EOS)


def response_of(ids: list[int]) -> str:
    """Behind its prompt, so with the space before its first word."""
    return "".join(f" {WORDS[i]}" for i in ids if i != EOS)


@torch.no_grad()
def kl_of(model, reference, prompts, responses) -> list[float]:
    found = []
    ours, theirs = [
        torch.log_softmax(
            logits_of(m, [[*p, *r, *[1] * (NEW - len(r))] for p, r in zip(prompts, responses, strict=True)]), -1
        )
        for m in (model, reference)
    ]
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        at = [len(prompt) - 1 + t for t in range(len(response))]
        found.append(float((ours[i, at, response] - theirs[i, at, response]).sum()))
    return found


def golds(split: str, responses) -> list[float]:
    return [task.gold_of(text_of(r), w) for r, w in zip(responses, task.weights(split), strict=False)]


def outcomes(run: Run, responses) -> list[float]:
    theirs = golds("test", sampled(task.load().reference, task.prompts("test"), REFERENCE))
    ours = golds("test", responses)
    return [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in zip(ours, theirs, strict=True)]


def responses_of(run: Run) -> list[list[int]]:
    """The test responses as they should have been sampled: by the final model, on test prompts, by the run's seed."""
    seed, prompts = POLICY + run.spec.seed, task.prompts("test")
    if run.spec.algorithm != f"best-of-{N}":
        return sampled(run.model, prompts, seed)
    found = [sampled(run.model, prompts, seed, per_prompt=N, skip=k) for k in range(N)]
    best = []
    for options in zip(*found, strict=True):
        proxies = [task.proxy_of(text_of(option)) for option in options]
        best.append(options[proxies.index(max(proxies))])  # by the reward, not the judge; the first of ties
    return best


ALL = [("sft", 3), (f"best-of-{N}", 3), ("reinforce", 3), ("reinforce", 4)]


@pytest.mark.parametrize("key", ALL, ids=str)
def test_the_samples_are_those_of_the_saved_model_on_the_test_prompts(runs, key):
    run = runs[1][key]
    expected, records = responses_of(run), run.test_samples
    assert [r["prompt"] for r in records] == [text_of(p) for p in task.prompts("test")] and len(records) == 1100
    agreeing = [r["response"] == response_of(e) for r, e in zip(records, expected, strict=True)]
    assert np.mean(agreeing) > 0.995  # float32 sums differ in their last bits, and a uniform may lie between
    assert [r["length"] for r in records if r["finish_reason"] == "length"] == [
        NEW for r in records if r["finish_reason"] == "length"
    ]


@pytest.mark.parametrize("key", ALL, ids=str)
def test_scores_and_statistics(runs, key):
    run = runs[1][key]
    result, records = run.result, run.test_samples
    responses = responses_of(run)
    texts = [r["response"] for r in records]
    gold = [task.gold_of(t, w) for t, w in zip(texts, task.weights("test"), strict=True)]
    proxy = [task.proxy_of(t) for t in texts]
    assert [r["gold"] for r in records] == pytest.approx(gold) and [r["proxy"] for r in records] == pytest.approx(proxy)
    assert result["gold"] == pytest.approx(np.mean(gold)) and result["proxy"] == pytest.approx(np.mean(proxy))
    lengths = [len(t.split()) + (r["finish_reason"] == "stop") for t, r in zip(texts, records, strict=True)]
    assert [r["length"] for r in records] == lengths and result["length"] == pytest.approx(np.mean(lengths))
    won = outcomes(run, responses)
    assert result["win_rate"] == pytest.approx(np.mean(won), abs=2e-3)
    assert result["win_rate_se"] == pytest.approx(math.sqrt(np.var(won, ddof=1) / len(won)), rel=1e-2)
    words = [t.split() for t in texts]
    pairs = [pair for row in words for pair in zip(row[:-1], row[1:], strict=True)]
    assert result["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))
    if run.spec.algorithm == f"best-of-{N}":
        assert result["kl_bound"] == pytest.approx(math.log(N) - (N - 1) / N) and not result["kl_is_bound"]
        assert 0 < result["kl"] <= result["kl_bound"]
        return
    kl = kl_of(run.model, task.load().reference, task.prompts("test"), responses)
    assert result["kl"] == pytest.approx(np.mean(kl), abs=5e-3 * max(1.0, abs(np.mean(kl))))
    assert result["kl_se"] == pytest.approx(np.std(kl, ddof=1) / math.sqrt(len(kl)), rel=2e-2, abs=1e-6)


def test_costs_are_what_was_sampled_and_scored(runs):
    for key in ALL:
        run = runs[1][key]
        calls, tokens = run.scored("train")
        if key[0] == "reinforce":
            assert calls == run.result["reward_calls"] == 4 * 32  # 100 episodes are four whole iterations of 32
            inference = sum(r["length"] for r in run.test_samples)
        elif key[0] == "sft":
            assert calls == run.result["reward_calls"] == 0
            inference = sum(r["length"] for r in run.test_samples)
        else:
            assert calls == 0 and run.result["reward_calls"] == N * 1100
            found = [sampled(run.model, task.prompts("test"), POLICY + 3, per_prompt=N, skip=k) for k in range(N)]
            inference = sum(len(row) for rows in found for row in rows)
        assert run.result["tokens_generated"] == pytest.approx(tokens + inference, rel=2e-3 if calls == 0 else 0)


def test_the_curve_is_of_validation_prompts(runs):
    run = runs[1]["reinforce", 3]
    last = run.lines("metrics.jsonl")[-1]
    responses = sampled(run.model, task.prompts("validation")[:24], POLICY)
    assert last["iteration"] == 4 and last["validation_gold"] == pytest.approx(np.mean(golds("validation", responses)))
    proxies = [task.proxy_of(text_of(r)) for r in responses]
    assert last["validation_proxy"] == pytest.approx(np.mean(proxies))
    shown = [r for r in run.lines("samples.jsonl") if r["split"] == "validation" and r["iteration"] == 4]
    assert [r["response"] for r in shown] == [response_of(r) for r in responses[: len(shown)]] and shown
    assert {r["prompt"].split()[0] for r in shown} == {WORDS[task.FIRST["validation"]]}


def test_training_saw_training_prompts_and_no_episode_twice(runs):
    for seed in (3, 4):
        run = runs[1]["reinforce", seed]
        metrics = run.lines("metrics.jsonl")
        assert [m["iteration"] for m in metrics] == [0, 1, 2, 3, 4]
        assert run.scored("train")[0] == 4 * 32
        assert json.loads((run.folder / "config.json").read_text())["agent"]["seed"] == seed  # of what it samples
        assert [m["tokens"] for m in metrics][-1] == run.scored("train")[1]


def test_a_resumed_run_is_charged_for_all_its_time(runs):
    run = runs[1]["reinforce", 4]
    walls = [m["wall_s"] for m in run.lines("metrics.jsonl")]
    assert walls == sorted(walls) and walls[0] == 0 and walls[3] > walls[2] > walls[1] > 0
    assert run.result["wall_s"] > walls[-1]


def test_csv_and_table(runs, tmp_path):
    out, found = runs
    rows = collect_results(out)
    write_csv(rows, tmp_path / "results.csv")
    read = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {(r["algorithm"], int(r["seed"])) for r in read} == set(ALL)
    for row in read:
        result = found[row["algorithm"], int(row["seed"])].result
        for name in ("win_rate", "win_rate_se", "gold", "proxy", "kl", "length", "distinct_2", "wall_s"):
            assert float(row[name]) == pytest.approx(result[name], rel=1e-5), name
        assert int(row["tokens_generated"]) == result["tokens_generated"]
        assert int(row["reward_calls"]) == result["reward_calls"]
    line = next(line for line in table(rows) if line.algorithm == "reinforce")
    pair = [found["reinforce", seed].result for seed in (3, 4)]
    assert line.seeds == (3, 4) and line.mean["gold"] == pytest.approx((pair[0]["gold"] + pair[1]["gold"]) / 2)
    assert line.spread["gold"] == pytest.approx(abs(pair[0]["gold"] - pair[1]["gold"]) / math.sqrt(2))
