"""The problem of a run that learns from the user's own data: SFT, reward modelling and DPO."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lm_envs.algos.engine.batching import units
from lm_envs.algos.engine.metrics import Averages
from lm_envs.algos.engine.preference_losses import REFERENCE_FREE
from lm_envs.algos.engine.settings_by_size import SMALL, far_off, learning_rate
from lm_envs.algos.policies.adaptation import Adaptation, adapted, save_model
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.algos.reward_modelling import RewardModelling, RewardPolicy
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.problems import Problem
from lm_envs.benchmarks.run.suites import Plan, check_overrides
from lm_envs.data import conventions, packed, sources
from lm_envs.data.dataset import Examples
from lm_envs.data.packed import PackedExamples, info_of, pack, tokenise
from lm_envs.feedback.summary import by_margin
from lm_envs.files import code_hash, replacing_folder
from lm_envs.model import loading, text
from lm_envs.model.adapters import has_adapters
from lm_envs.model.checking import check_model
from lm_envs.model.text import Codec
from lm_envs.model.tokens import context_of
from lm_envs.processes import group
from lm_envs.reward.learned import pools_last_token, reward_start

KINDS: dict[str, conventions.Kind] = {"sft": "demonstrations", "reward-modelling": "preferences", "dpo": "preferences"}
_MICRO_BATCH = 16  # default rows a forward; the gradient does not depend on it
_SHOWN = ("loss", "perplexity", "accuracy", "margin", "wanted_reward", "unwanted_reward")
_SAMPLE = 256  # held-out examples at a point of the learning curve
_CODE = code_hash(str(module.__file__) for module in (sources, conventions, packed, text))


@dataclass(frozen=True)
class DataSpec:
    """Everything that decides such a run, in JSON's types."""

    algorithm: str  # a key of KINDS
    model: str  # the model to start from, a folder or a hub name
    data: str  # a source, see lm_envs.data.sources.read_rows
    seed: int = 0
    plan: Plan = Plan()
    epochs: float = 1.0  # passes over the data, if the plan has no number of iterations
    overrides: dict[str, Any] = field(default_factory=dict)
    adaptation: dict[str, Any] = field(default_factory=dict)
    held_out: float = 0.05  # share of the prompts to measure on and not to train on
    on_bad: str = "raise"  # or "skip"
    max_length: int | None = None  # tokens of prompt and completion together; None is the model's context
    max_rows: int | None = None
    weight: str | None = None  # the column of each preference's weight in the loss; None is 1
    dtype: str | None = None  # None is float32
    device: str | None = None  # None is the CPU

    task_seed = 0  # its models are given
    folder = ""  # the run is in OUT itself, not in a folder of a comparison

    @property
    def task(self) -> str:
        return self.data

    @property
    def label(self) -> str:
        return self.algorithm

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


class DataProblem(Problem):
    """Data, a model, and the agent that trains it on them.

    Args:
        out: the run's folder, which also holds the tokenized data.
        progress: called with the number of examples tokenized so far.

    Attributes:
        info: facts about the tokenized data: rows, skipped rows and why.
    """

    def __init__(self, spec: DataSpec, out: Path, progress: Callable[[int], object] = lambda done: None) -> None:
        self.spec, self.folder, self._progress = spec, out / "data", progress
        rate = learning_rate(spec.algorithm, 0, lora=False)
        overrides = {"learning_rate": rate, "episodes": 32, **spec.overrides}
        checked = check_overrides(spec.algorithm, overrides)
        placement = loading.Placement(spec.dtype or "float32", spec.device)
        self._rewarding = spec.algorithm == "reward-modelling"
        self._kind: conventions.Kind = "judgments" if checked.get("loss") == "kto" else KINDS[spec.algorithm]
        if self._rewarding:
            self.model, self.tokenizer = reward_start(spec.model, spec.seed, placement)
        else:
            self.tokenizer = loading.load_tokenizer(spec.model, "model")
            self.model = loading.load_policy(spec.model, "model", placement)
            loading.check_fits(self.tokenizer, loading.vocabulary_of(self.model), f"model {spec.model!r}")
            check_model(self.model, f"model {spec.model!r}")
        context = context_of(self.model)
        self.info = group.first(lambda: self._packed(context), "the tokenized data")
        examples = PackedExamples(self.folder, self._kind != "demonstrations", self._kind == "judgments")
        self._train, held = examples.divide(spec.held_out)
        if not len(self._train):
            raise UserError(f"{spec.data}: the column 'split' leaves nothing to train on")
        if spec.weight is not None and not self._train.column("weight").view(np.float64).any():
            raise UserError(
                f"{spec.data}: the weight {spec.weight!r} is 0 in all rows to train on: nothing can be learned"
            )
        self._held_out = held
        self.model = self._to_train()
        size, lora = sum(p.numel() for p in self.model.parameters()), has_adapters(self.model)
        if "learning_rate" not in spec.overrides and size >= SMALL:
            checked["learning_rate"] = learning_rate(spec.algorithm, size, lora)
        elif why := far_off(spec.algorithm, checked["learning_rate"], size, lora):
            warnings.warn(f"{spec.algorithm}: {why}", stacklevel=1)
        eos = self.tokenizer.eos_token_id
        language = None if self._rewarding else LMPolicy(self.model, eos, *self._train.longest)
        self.policy: Any = language or RewardPolicy(self.model)
        settings = {"seed": spec.seed, "micro_batch": _MICRO_BATCH, **checked}
        if "iterations" not in checked:
            passes = math.ceil(self.spec.epochs * self._examples(self._train) / settings["episodes"])
            settings["iterations"] = spec.plan.iterations or max(1, passes)
        self.agent = make_agent(spec.algorithm, self.policy, data=self._train, **settings)
        self._held = self.agent.rows_of(held) if len(held) else None

    def _packed(self, context: int | None) -> dict[str, Any]:
        """Tokenize the data into the run's folder, unless it holds them; return the facts about them."""
        limits = [limit for limit in (self.spec.max_length, context) if limit is not None]
        codec = Codec(self.tokenizer, self.model)
        reward_eos = pools_last_token(self.model) if self._rewarding else None
        made_from = {name: getattr(self.spec, name) for name in ("algorithm", "on_bad", "max_rows", "weight")} | {
            "kind": self._kind,
            "max_length": min(limits, default=None),
            "reward_eos": reward_eos,
            "data": sources.fingerprint(self.spec.data),
            "format": sources.format_of(self.spec.data),
            "tokenizer": codec.fingerprint,
            "code": _CODE,
        }
        found = info_of(self.folder)
        if found is not None and found.get("made_from") == made_from:
            return found
        data = Examples(self.spec.data, self._kind, self.spec.on_bad, self.spec.max_rows)  # type: ignore[arg-type]
        encoded = tokenise(data, codec, data.rejected, made_from["max_length"], reward_eos, self.spec.weight)

        def info() -> dict[str, Any]:
            known = {"convention": data.convention.name, "format": data.format, "kind": self._kind, "rows": data.read}
            known |= {"unwanted": data.unwanted, "skipped": data.rejected.count}
            known["examples"] = data.read - data.unwanted - data.rejected.count
            skipped = [[bad.where, bad.reason] for bad in data.rejected.rows]
            return {"made_from": made_from, **known, "skipped_rows": skipped}

        with replacing_folder(self.folder) as folder:
            pack(encoded, folder, info, self._progress)
            if not info()["examples"]:
                why = f"; {data.unwanted} are labeled as not wanted" if data.unwanted else ""
                why += f"; {data.rejected.rows[0].where}: {data.rejected.rows[0].reason}" if data.rejected.rows else ""
                raise UserError(f"{self.spec.data}: none of {data.read} rows is usable{why}")
        return info()

    def _to_train(self) -> Any:
        if not self.spec.adaptation and not has_adapters(self.model):
            return self.model.requires_grad_(True)
        model: Any = adapted(self.model, Adaptation(**self.spec.adaptation), self.spec.seed)
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
        if self._rewarding and head is not None:
            head.requires_grad_(True)  # adapters or not, the head is new
        return model

    def _examples(self, data: PackedExamples) -> int:
        """Count what a batch is made of: texts, or groups of ranked ones."""
        grouped = self._kind == "preferences" and data.group is not None
        return len(torch.unique(data.group)) if grouped else _rows(data)

    def plan(self) -> str:
        """Return a line about the amount of data and training."""
        held = self._examples(self._held_out)
        config = self.agent.config
        return (
            f"{self._examples(self._train):,} to train on, {held:,} held out; {config.iterations:,} "
            f"iteration{'s' * (config.iterations > 1)} of {config.episodes:,}"
        )

    def settings(self) -> dict[str, Any]:
        return {
            "agent": asdict(self.agent.config),
            "data": {name: value for name, value in self.info.items() if name != "skipped_rows"}
            | {"trained_on": _rows(self._train), "held_out": _rows(self._held_out)},
        } | self.sizes(self.model, self.model)

    def validate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        return self._measure(_SAMPLE)[0], []

    def evaluate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        means, pairs = self._measure(None)
        found: dict[str, Any] = {f"held_out_{name}": value for name, value in means.items()}
        return found | ({"calibration": by_margin(pairs, "accuracy")} if pairs else {}), []

    def costs(self, measured: dict[str, Any]) -> dict[str, int]:
        return {"trained_tokens": self.agent.trained_tokens}  # nothing is sampled

    @torch.no_grad()
    def _measure(self, most: int | None) -> tuple[dict[str, float], list[tuple[int, float, float]]]:
        """Means over held-out examples, and a reward model's pairs as :func:`by_margin` takes them."""
        if self._held is None:
            return {}, []
        averages, pairs = Averages(), list[tuple[int, float, float]]()
        chunks = torch.arange(len(self._held))[:most].split(self.agent.config.micro_batch or _MICRO_BATCH)
        for chosen in chunks[group.rank() :: group.world()]:
            part = self._held.select(chosen).to(self.model.device)
            part.weight = None
            now = self.policy.evaluate(part)
            loss, metrics = self.agent.loss(part, now, {})
            averages.add({"loss": loss, **metrics}, units(part, self.agent.unit))
            if isinstance(self.agent, RewardModelling):
                groups, margins = self.agent.margins(part, now)
                outcomes = 0.5 + 0.5 * margins.sign()
                numbers = chosen[groups.cpu()].tolist()
                pairs += zip(numbers, margins.abs().tolist(), outcomes.tolist(), strict=True)
        found = Averages().join(*group.exchange(averages, "the measures of held-out rows")).means()
        if self.spec.algorithm == "sft":
            found["perplexity"] = math.exp(min(found["loss"], 700.0))
        has_reference = self.spec.algorithm == "dpo" and self.agent.config.loss not in REFERENCE_FREE
        if has_reference and not self.agent.iterations_done:
            del found["accuracy"]  # the reference against itself: rounding decides
        shared = group.exchange(pairs, "the pairs of held-out rows")
        return {name: found[name] for name in _SHOWN if name in found}, [pair for part in shared for pair in part]

    def save_model(self, folder: Path) -> None:
        """Save the tuned model and its tokenizer for transformers' ``from_pretrained``; adapters of a reward model are
        merged into its weights."""
        merge = self._rewarding or bool(self.spec.adaptation.get("lora_merge", False))
        save_model(self.model, self.tokenizer, folder, merge, () if self._rewarding else self._train.ends)


def _rows(data: PackedExamples) -> int:
    """Count the completions, without mismatched ones."""
    return len(data) if data.rank is None else int((data.rank >= 0).sum())
