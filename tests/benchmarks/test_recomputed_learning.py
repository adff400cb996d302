"""What sft, reward-model and dpo leave is computed here a second time: a plain loop over plain transformers models.

The loop knows the file of data alone: it forms the batches, the losses with the rows' weights, the gradients' clipping
and Adam's steps itself, so that weights, learning curves, held-out figures and counts follow from it.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lm_envs.benchmarks.cli import main
from tests.lm_envs import byo

SEED, SIZE, ITERATIONS, RATE, BETA = 3, 5, 3, 1e-2, 0.7
TEXTS = [" a fish .", " hid", " saw the old bird", " ate ."]


def rows_of(command: str) -> list[dict]:
    """Eleven to train on, of which the third batch of five takes the last and the first, and three held out."""
    rows = []
    for i in range(14):
        row = {"prompt": f"the cat {i}", "split": "test" if i % 5 == 4 else "validation" if i == 7 else "train"}
        said = [TEXTS[(i + k) % 4] for k in range(2 + i % 2)]
        if command == "sft":
            row["completion"] = said[0]
        else:
            row |= {"completions": said, "ranks": [1, 0, 2][: len(said)], "trust": 0.5 * (i % 4)}
        rows.append(row)
    return rows


@dataclass
class Run:
    """A command's folder, what it was given, and what a plain loop makes of that."""

    command: str
    folder: Path
    start: Path
    rows: list[dict]
    losses: list[float] = field(default_factory=list)  # of the batches
    curve: list[dict[str, float]] = field(default_factory=list)  # held-out figures, before each batch and at the end
    tokens: list[int] = field(default_factory=list)  # with a gradient, up to each point of the curve

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.start)
        self.model, self.reference = self.fresh(), self.fresh()
        self.train = [row for row in self.rows if row["split"] == "train"]
        self.held = [row for row in self.rows if row["split"] != "train"]
        self.loop()

    def fresh(self):
        if self.command != "reward-model":
            return AutoModelForCausalLM.from_pretrained(self.start, dtype=torch.float64)
        model = AutoModelForSequenceClassification.from_pretrained(self.start, dtype=torch.float64, num_labels=1)
        size = model.score.weight.shape[1]
        drawn = torch.Generator().manual_seed(SEED)
        model.score.weight.data.normal_(std=(size + 1) ** -0.5, generator=drawn)
        model.config.pad_token_id = None
        return model

    def ids(self, row: dict, said: str) -> tuple[list[int], int]:
        """Prompt, completion and end; and how many are the prompt's."""
        before = self.tokenizer(row["prompt"])["input_ids"]
        whole = self.tokenizer(row["prompt"] + said)["input_ids"]
        assert whole[: len(before)] == before
        return [*whole, self.tokenizer.eos_token_id], len(before)

    def logprob(self, model, row: dict, said: str) -> torch.Tensor:
        ids, begin = self.ids(row, said)
        logits = model(torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits, -1)[range(begin - 1, len(ids) - 1), ids[begin:]]

    def ratio(self, row: dict, said: str) -> torch.Tensor:
        with torch.no_grad():
            before = self.logprob(self.reference, row, said).sum()
        return self.logprob(self.model, row, said).sum() - before

    def value(self, row: dict, said: str) -> torch.Tensor:
        """What the pairs' loss compares."""
        if self.command == "dpo":
            return BETA * self.ratio(row, said)
        return self.model(torch.tensor([self.ids(row, said)[0]])).logits[0, 0]

    def margins(self, row: dict) -> list[torch.Tensor]:
        values, ranks = [self.value(row, said) for said in row["completions"]], row["ranks"]
        return [values[i] - values[j] for i, j in itertools.product(range(len(ranks)), repeat=2) if ranks[i] < ranks[j]]

    def loss(self, batch: list[dict], weighted: bool) -> torch.Tensor:
        if self.command == "sft":
            said = torch.cat([self.logprob(self.model, row, row["completion"]) for row in batch])
            return -said.mean()
        each = [torch.stack([-logsigmoid(margin) for margin in self.margins(row)]).mean() for row in batch]
        weights = [row["trust"] if weighted else 1.0 for row in batch]
        return sum(w * x for w, x in zip(weights, each, strict=True)) / len(batch)

    @torch.no_grad()
    def measured(self) -> dict[str, float]:
        found = {"loss": float(self.loss(self.held, weighted=False))}
        if self.command == "sft":
            return found | {"perplexity": math.exp(found["loss"])}
        margins = [float(margin) for row in self.held for margin in self.margins(row)]
        found["accuracy"] = float(np.mean([margin > 0 for margin in margins]))
        return found | ({"margin": float(np.mean(margins))} if self.command == "dpo" else {})

    def loop(self) -> None:
        """Each pass is in an order of its own, and a batch may go over the end of one."""
        passes = [np.random.default_rng((SEED, k)).permutation(len(self.train)) for k in range(2)]
        order, parameters = np.concatenate(passes).tolist(), list(self.model.parameters())
        adam = torch.optim.Adam(parameters, eps=1e-5)
        self.curve, self.tokens = [self.measured()], [0]
        for i in range(ITERATIONS):
            batch = [self.train[k] for k in order[i * SIZE : (i + 1) * SIZE]]
            adam.param_groups[0]["lr"] = RATE * (1 - i / ITERATIONS)
            adam.zero_grad()
            loss = self.loss(batch, weighted=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            self.losses.append(float(loss.detach()))
            said = [(row, text) for row in batch for text in row.get("completions", [row.get("completion")])]
            read = [len(self.ids(row, text)[0]) - self.begin(row) for row, text in said]
            self.tokens.append(self.tokens[-1] + sum(read))
            self.curve.append(self.measured())

    def begin(self, row: dict) -> int:
        """Tokens that are not learned from: a reward model reads prompt and completion as one text."""
        return 0 if self.command == "reward-model" else len(self.tokenizer(row["prompt"])["input_ids"])

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().split("\n") if line]


@pytest.fixture(scope="module", params=["sft", "reward-model", "dpo"])
def run(request, tmp_path_factory) -> Run:
    root, command = tmp_path_factory.mktemp("learning"), request.param
    tokenizer = byo.byte_level_bpe()
    byo.llama(len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = rows_of(command)
    words = [command, "--model", root / "model", "--data", byo.write_jsonl(root / "rows.jsonl", rows)]
    words += ["--out", root / "out", "--learning-rate", RATE, "--batch-size", SIZE, "--seed", SEED, "--threads", 1]
    words += ["--iterations", ITERATIONS, "--validate-every", 1, "--checkpoint-every", 2, "--dtype", "float64"]
    words += ["--set", "micro_batch=3"]
    words += {"sft": [], "reward-model": ["--weight", "trust"], "dpo": ["--weight", "trust", "--set", f"beta={BETA}"]}[
        command
    ]
    main([str(word) for word in words])
    return Run(command, root / "out", root / "model", rows)


def test_the_saved_weights_are_those_of_a_plain_loop(run):
    kind = AutoModelForSequenceClassification if run.command == "reward-model" else AutoModelForCausalLM
    saved, start = kind.from_pretrained(run.folder / "model", dtype=torch.float64).state_dict(), run.reference
    for name, tensor in run.model.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6)  # the reference is kept in float32
    assert any(not torch.allclose(saved[name], tensor, atol=1e-3) for name, tensor in start.state_dict().items())


def test_the_learning_curve(run):
    lines = run.lines()
    assert [line["iteration"] for line in lines] == list(range(ITERATIONS + 1))
    name = {"sft": "nll", "reward-model": "ranking_loss", "dpo": "dpo_loss"}[run.command]
    assert [line[name] for line in lines[1:]] == pytest.approx(run.losses, rel=1e-6)
    assert [line["learning_rate"] for line in lines[1:]] == pytest.approx([RATE * (1 - i / 3) for i in range(3)])
    for line, known in zip(lines, run.curve, strict=True):
        if run.command == "dpo" and line["iteration"] == 0:
            del known["accuracy"]  # the reference against itself
        found = {key.removeprefix("validation_"): line[key] for key in line if key.startswith("validation_")}
        assert found == pytest.approx(known, rel=1e-6, abs=1e-6)


def test_the_result_and_what_it_cost(run):
    result = json.loads((run.folder / "result.json").read_text())
    held = {key.removeprefix("held_out_"): value for key, value in result.items() if key.startswith("held_out_")}
    assert held == pytest.approx(run.curve[-1], rel=1e-6, abs=1e-6)
    assert result["trained_tokens"] == run.tokens[-1] and (result["algorithm"], result["seed"]) == (
        {"reward-model": "reward-modelling"}.get(run.command, run.command),
        SEED,
    )
    assert [line["trained_tokens"] for line in run.lines()] == run.tokens


def test_the_facts_about_the_data(run):
    config = json.loads((run.folder / "config.json").read_text())
    each = [len(row.get("completions", [0])) for row in run.rows]
    trained = [count for count, row in zip(each, run.rows, strict=True) if row["split"] == "train"]
    data = config["data"]
    assert (data["rows"], data["examples"], data["skipped"], data["unwanted"]) == (14, 14, 0, 0)
    assert (data["trained_on"], data["held_out"]) == (sum(trained), sum(each) - sum(trained))
    assert config["parameters"] == config["trainable_parameters"] == sum(p.numel() for p in run.model.parameters())
