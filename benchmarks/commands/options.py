"""Options that several commands share: a task of the user's own, which part of a model is trained, and how far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import tyro

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.names import base_task, is_control
from lm_envs.benchmarks.run.stop_rules import parse_rule
from lm_envs.benchmarks.run.suites import BUDGETS, Guards, Service, Suite, check_adaptation, env_options, parse_settings
from lm_envs.data.sources import format_of
from lm_envs.reward.specs import is_spec, parse_reward
from lm_envs.settings import Count, Positive, Rank, Several, Threads, Whole, make

C = TypeVar("C")


@dataclass(frozen=True)
class Own:
    """The source of a task of your own, and how its models are loaded."""

    corpus: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Make the task "corpus" from your labeled text: a JSONL file with "text" and "label" (0 or 1), and optionally
    "split"."""
    parallel: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Make the task "translation" from your parallel text: a JSONL file with "prompt" and "reference", and optionally
    "split"."""
    policy: Annotated[str | None, tyro.conf.arg(metavar="DIR", aliases=["--model"])] = None
    """Make the task "custom": the policy to tune, a folder of save_pretrained, a GGUF file, "smollm2" (of the extra
    pretrained) or a hub name."""
    reward_model: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Reward model of "custom", with its own tokenizer: a folder or a hub name. Its scores are standardized by those of
    the reference's samples; short for --reward 'standardise(model:DIR)'."""
    reward: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="REWARD")] = ()
    """Reward of "custom" for training, instead of --reward-model; if repeated, they are summed. One is model:DIR, bleu,
    chrf, rougeL (against the prompts' column "reference"), judge:URL#MODEL or my_file.py:function (runs that file); as
    in --reward 'bleu*0.5', 'clip(model:DIR, -2, 2)', 'standardise(my_file.py:f)'."""
    prompts: Annotated[str | None, tyro.conf.arg(metavar="FILE", aliases=["--data"])] = None
    """Prompts of "custom": JSONL, CSV or Parquet with a "prompt" a row (text or chat messages), and optionally "split"
    (train, validation, test); or a data set of the hub. `lm-envs data check FILE` says what it holds."""
    bad: Literal["raise", "skip"] = "raise"
    """A bad row of the prompts stops everything before any training (raise), or is left out with a warning (skip)."""
    judge: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Judge of "custom", which decides win-rates: another reward model or reward; without one there are none."""
    reference: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Reference of "custom" for the KL penalty; the policy as it starts if not given; "base" for the model under a
    policy's adapters."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Precision of the policy and the reference of "custom": float32 (the default), bfloat16, float64, or auto."""
    device: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Device of the models of "custom", as in cuda:1; the CPU if not given."""
    device_map: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The same through accelerate, as in auto; each model has to fit on one device."""
    recompute: bool = False
    """Accept a model for "custom" whose cache cannot be kept row by row, at the cost of a whole forward a token."""

    def options(self) -> dict[str, dict[str, Any]]:
        """Return the loader's options by task."""
        found: dict[str, dict[str, Any]] = {}
        if self.corpus is not None:
            found["corpus"] = {"path": str(self.corpus)}
        if self.parallel is not None:
            found["translation"] = {"path": str(self.parallel)}
        custom: dict[str, Any] = {"policy": self.policy, "prompts": self.prompts, **self._rewards()}
        names = ("judge", "reference", "dtype", "device", "device_map", "recompute", "bad")
        more = {name: value for name in names if (value := getattr(self, name)) not in (None, False, "raise")}
        if more or any(value is not None for value in custom.values()):
            flags = {name: f"--{name.replace('_', '-')}" for name in custom}
            flags["reward_model"] = "--reward-model or --reward"
            missing = [flags[name] for name, value in custom.items() if value is None]
            if missing:
                raise UserError(
                    "a task of your own needs --policy, --reward-model or --reward, and --prompts; "
                    f"missing: {', '.join(missing)}"
                )
            found["custom"] = custom | more
        for source in (self.corpus, self.parallel, self.prompts):
            if source is not None:
                format_of(source)  # raises FileNotFoundError
        return found

    def _rewards(self) -> dict[str, Any]:
        if self.reward and self.reward_model is not None:
            model = f"standardise(model:{self.reward_model})"
            raise UserError(f"--reward-model is short for one reward; beside others write --reward {model!r}")
        for texts in (self.reward, (self.judge,) if self.judge is not None and is_spec(self.judge) else ()):
            if texts:
                parse_reward(texts)
        return {"reward": list(self.reward)} if self.reward else {"reward_model": self.reward_model}


@dataclass(frozen=True)
class Adapt:
    """The part of the language model to train; all of it if nothing is given."""

    freeze_layers: Annotated[Whole | None, tyro.conf.arg(metavar="N")] = None
    """Leave the N lower layers, and the embeddings below them, as they are."""
    lora_rank: Annotated[Rank | None, tyro.conf.arg(metavar="R")] = None
    """Train low-rank adapters of this rank instead of the weights (needs the extra "lora"), which is the default from
    100 million parameters on, with rank 16; 0 trains the weights."""
    lora_alpha: Annotated[Positive | None, tyro.conf.arg(metavar="A")] = None
    """Scale the adapters by A / R; twice the rank if not given."""
    lora_targets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Linear maps of a layer that get adapters, such as q_proj v_proj; all if not given."""
    lora_merge: bool = False
    """Save the tuned model with the adapters added to its weights, instead of the adapters."""

    def settings(self, suite: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """Return the given settings, on top of a suite's, in JSON's types, checked."""
        given = {name: value for name, value in vars(self).items() if value not in (None, ()) and value is not False}
        if "lora_targets" in given:
            given["lora_targets"] = list(self.lora_targets)  # as JSON and TOML have it
        check_adaptation(found := {**suite, **given})
        return found


@dataclass(frozen=True, kw_only=True)
class ManyProcesses:
    """A command that processes can carry out together."""

    processes: Annotated[Threads, tyro.conf.arg(metavar="N")] = 1
    """Processes on this machine that carry out each run together, each a share of every batch; the result is that of
    one (docs/scale.md). Started by torchrun, the command takes its processes instead."""
    fsdp: bool = False
    """Share out gradients and Adam's state among the processes (FSDP2), and during updates all weights, instead of a
    copy on each: less memory, more communication, the same result."""


@dataclass(frozen=True, kw_only=True)
class Ends:
    """How long a run goes on, and what ends it before."""

    iterations: Annotated[Count | None, tyro.conf.arg(metavar="N")] = None
    """Training iterations of every run; the algorithm's own number, or the suite's, if not given."""
    episodes: Annotated[Count | None, tyro.conf.arg(metavar="N")] = None
    """Training episodes of every run, instead of iterations: an equal number of reward calls for all."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="RULE")] = ()
    """End a run before its budget: "kl > 20", "gold < 0.5" or "gold no better for 10" (measurements of the learning
    curve); may be repeated, and replaces the rules of a suite. Read at measurements on validation prompts, a bound on
    the KL also at every batch."""
    guard: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """When a policy counts as collapsed: kl_per_token=1.5 or more, distinct_2=0.25 of the start's or less; and
    action=stop, tell or off. Language models from 20 million parameters on stop, others are told of."""

    def plan(self) -> dict[str, Any]:
        """Return the fields of a plan that are given."""
        if not (self.iterations or self.episodes):
            return {}
        return dict.fromkeys(BUDGETS) | {"iterations": self.iterations, "episodes": self.episodes}

    def guards(self) -> dict[str, Any]:
        """Return the settings of guards that are given, checked."""
        given = parse_settings(self.guard, "--guard", "kl_per_token=2")
        made = make(Guards, given, "--guard")
        return {name: getattr(made, name) for name in given}

    def rules(self) -> tuple[str, ...]:
        """Return the stop rules, checked."""
        return tuple(dict.fromkeys(str(parse_rule(rule)) for rule in self.stop))


@dataclass(frozen=True, kw_only=True)
class Records:
    """What a run leaves, and what follows it."""

    extend: bool = False
    """Continue what OUT holds, and take runs with a smaller budget on to the one that is given, from what --keep 1
    left."""
    keep: Annotated[Whole | None, tyro.conf.arg(metavar="N")] = None
    """Checkpoints that a finished run keeps, with the optimizer's state; none if not given, but always the model. While
    it trains there are at least two."""
    track: Annotated[tuple[Service, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Services that follow the runs beside TensorBoard: wandb, mlflow or trackio (extras of the same names)."""
    show: Annotated[Whole, tyro.conf.arg(metavar="N")] = 0
    """Iterations between a few sampled texts on the screen, with their scores; none if not given."""


@dataclass(frozen=True, kw_only=True)
class Running(ManyProcesses):
    """Options of the commands that train on tasks."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the results."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An option of the environment: kl_coef, temperature, max_new_tokens, min_new_tokens; may be repeated."""
    test_prompts: Annotated[Several | None, tyro.conf.arg(metavar="N")] = None
    """Test prompts that what is trained is measured on; 256 if neither given here nor in a suite."""
    resume: bool = False
    """Continue what OUT holds."""
    compile: bool = False
    """Compile the policy's sampling with torch.compile, which takes seconds to minutes each time: for long runs
    (docs/throughput.md)."""
    ends: Annotated[Ends, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="budget")] = Ends()
    records: Annotated[Records, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="records")] = Records()
    adapt: Annotated[Adapt, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="trained part")] = Adapt()
    own: Annotated[Own, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="own task")] = Own()

    def how(self) -> dict[str, Any]:
        """Return how runs are carried out, as :func:`lm_envs.benchmarks.run.compare.compare` takes it."""
        names = ("extend", "track", "show")
        return {"resume": self.resume or self.records.extend} | {name: getattr(self.records, name) for name in names}

    def applied(self, suite: Suite, own: dict[str, dict[str, Any]], **plan: Any) -> Suite:
        """Return a suite with the given budget, options of the environment, adaptation, and the user's own tasks.

        Args:
            own: from :meth:`Own.options`.
            plan: further fields of the plan.
        """
        options = env_options(parse_settings(self.env, "--env", "kl_coef=0.1"), "--env")
        plan |= {"test_prompts": self.test_prompts} if self.test_prompts else {}
        tasks = [task if is_control(task.name) else replace(task, env={**task.env, **options}) for task in suite.tasks]
        suite = replace(
            suite,
            tasks=tuple(tasks),
            plan=replace(suite.plan, **plan, **self.ends.plan()),
            adaptation=self.adapt.settings(suite.adaptation),
            guards=suite.guards | self.ends.guards(),
            stop=self.ends.rules() or suite.stop,
            compile=suite.compile or self.compile,
            keep=suite.keep if self.records.keep is None else self.records.keep,
        )
        return _with_own(suite, own)


def command_of(kind: type[C], values: Mapping[str, Any], where: str) -> C:
    """Make a command from its options by name, whichever group they are in.

    Raises:
        SettingError: an unknown option, or a value of the wrong type or out of range; ``where`` begins the message.
    """
    left = dict(values)
    groups: dict[str, Any] = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    for name, group in groups.items():
        names = {field.name for field in fields(group)} if is_dataclass(group) else set()
        if mine := {option: left.pop(option) for option in list(left) if option in names}:
            left[name] = make(type(group), mine, where)
    return make(kind, left, where)


def _with_own(suite: Suite, own: dict[str, dict[str, Any]]) -> Suite:
    """A suite whose tasks of the user's own have their sources."""
    named = {base_task(task.name)[0]: task for task in suite.tasks}
    needs = {
        "corpus": "--corpus FILE.jsonl",
        "translation": "--parallel FILE.jsonl",
        "custom": "--policy, --reward-model or --reward, and --prompts",
    }
    for name, option in needs.items():
        if name in named and name not in own and not named[name].options:
            raise UserError(f"task {name!r} needs {option}")
    for name in own:
        if name not in named:
            others = ", ".join(named)
            raise UserError(f"{needs[name]} makes the task {name!r}, which is not among those to run: {others}")
    tasks = [replace(task, options={**task.options, **own.get(base_task(task.name)[0], {})}) for task in suite.tasks]
    return replace(suite, tasks=tuple(tasks))
