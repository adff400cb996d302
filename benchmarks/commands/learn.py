"""``lm-envs sft``, ``reward-model`` and ``dpo``: stages of the pipeline, each from a model and a file to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from rich.console import Console
from rich.table import Table

from lm_envs.benchmarks.commands.options import Adapt, ManyProcesses
from lm_envs.benchmarks.commands.people import show_tables
from lm_envs.benchmarks.errors import Interrupted, UserError
from lm_envs.benchmarks.run.suites import Plan, Service, parse_settings
from lm_envs.settings import Count, Positive, Rate, Seed, Share, Size, Threads, Whole

_SHOWN = 10  # skipped rows on the screen; data/info.json has all


@dataclass(frozen=True)
class _Learn(ManyProcesses):
    model: Annotated[str, tyro.conf.arg(metavar="DIR", aliases=["--policy"])]
    """The model to start from, and its tokenizer: a folder of save_pretrained, a GGUF file, "smollm2" (of the extra
    pretrained) or a hub name."""
    data: Annotated[str, tyro.conf.arg(metavar="FILE", aliases=["--prompts"])]
    """JSONL, CSV, Parquet, a folder of them, or OWNER/NAME[/CONFIG][:SPLIT] of the hub; `lm-envs data check` says what
    it holds."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the results."""
    epochs: Positive = 1.0
    """Passes over the data."""
    iterations: Annotated[Count | None, tyro.conf.arg(metavar="N")] = None
    """Batches to learn from, instead of epochs."""
    batch_size: Annotated[Size | None, tyro.conf.arg(metavar="N")] = None
    """Examples a batch; 32 if not given."""
    learning_rate: Annotated[Rate | None, tyro.conf.arg(metavar="X")] = None
    """Adam's step size at the start; the default suits pretrained models, small ones need more."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Another setting of the algorithm, as in --set micro_batch=4; may be repeated."""
    bad: Literal["raise", "skip"] = "raise"
    """A bad row stops everything before any training (raise), or is left out and listed (skip)."""
    max_length: Annotated[Count | None, tyro.conf.arg(metavar="N")] = None
    """Rows with more tokens are bad; what the model reads if not given."""
    max_rows: Annotated[Count | None, tyro.conf.arg(metavar="N")] = None
    """Read no more rows of the data."""
    held_out: Share = 0.05
    """Share of the prompts to measure on and not to train on, where the data have no column "split"."""
    seed: Seed = 0
    """Seed of the order of the data and of new weights."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The model's precision: float32 (the default), bfloat16, float64, or auto."""
    device: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The model's device, as in cuda:1; the CPU if not given."""
    validate_every: Whole = Plan.validate_every
    """Iterations between measurements on held-out rows, 0 for none."""
    checkpoint_every: Count = 100
    """Iterations between checkpoints."""
    resume: bool = False
    """Continue what OUT holds."""
    track: Annotated[tuple[Service, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Services that follow the run beside TensorBoard: wandb, mlflow or trackio (extras of the same names)."""
    threads: Annotated[Threads | None, tyro.conf.arg(metavar="N")] = None
    """Torch threads of each process."""
    adapt: Annotated[Adapt, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="trained part")] = Adapt()

    algorithm: ClassVar[str]

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.run.data_problem import DataSpec
        from lm_envs.feedback.exchange import rows_of

        given = {"learning_rate": self.learning_rate, "episodes": self.batch_size, "loss": getattr(self, "loss", None)}
        overrides = {name: value for name, value in given.items() if value is not None} | parse_settings(self.set)
        settings = {field.name: getattr(self, field.name) for field in fields(DataSpec) if hasattr(self, field.name)}
        planned = {name: getattr(self, name) for name in ("iterations", "validate_every", "checkpoint_every")}
        spec = DataSpec(
            **settings | {"data": rows_of(self.data)},
            plan=Plan(**planned),
            overrides=overrides,
            adaptation=self.adapt.settings(),
            on_bad=self.bad,
        )
        how: dict[str, Any] = {"resume": self.resume, "track": self.track, "threads": self.threads}
        learn_from_data(spec, self.out, **how, console=console)


@dataclass(frozen=True)
class _Preferences(_Learn):
    weight: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Multiply each row's loss by this column; a study's rows have "agreement" (docs/people.md)."""


@dataclass(frozen=True)
class Sft(_Learn):
    """Fine-tune a language model on demonstrations by maximum likelihood.

      lm-envs sft --model base --data demonstrations.jsonl --out runs/sft

    From preferences it learns the chosen completions. OUT/model then holds the model, for the next stage and for
    transformers.
    """

    algorithm = "sft"


@dataclass(frozen=True)
class RewardModel(_Preferences):
    """Train a reward model on preferences, from a language model with a fresh head or from a reward model.

      lm-envs reward-model --model runs/sft/model --data preferences.jsonl --out runs/rm

    OUT/model then holds an AutoModelForSequenceClassification with one label, and its tokenizer.
    """

    algorithm = "reward-modelling"


@dataclass(frozen=True)
class Dpo(_Preferences):
    """Fine-tune a language model on preferences directly (DPO and its family); its start is the reference.

      lm-envs dpo --model runs/sft/model --data preferences.jsonl --out runs/dpo --set beta=0.1

    With --loss kto it learns from single completions with a label instead.
    """

    loss: Literal["sigmoid", "ipo", "cdpo", "robust", "simpo", "orpo", "kto"] | None = None
    """DPO's sigmoid (the default) or another loss; docs/algorithms.md has their formulas and settings."""

    algorithm = "dpo"


def learn_from_data(
    spec: Any, out: Path, *, resume: bool, threads: int | None, console: Console, track: Sequence[Service] = ()
) -> dict[str, Any]:
    """Carry out a stage (a :class:`~lm_envs.benchmarks.run.data_problem.DataSpec`) in ``out``, or the rest of it, and
    print its results."""
    from transformers.utils.logging import disable_progress_bar

    from lm_envs.benchmarks.run.compare import gone_if_refused
    from lm_envs.benchmarks.run.data_problem import DataProblem
    from lm_envs.benchmarks.run.one_run import BEFORE_CONFIG, execute, settings_of
    from lm_envs.benchmarks.run.progress import Display
    from lm_envs.benchmarks.run.storage import Checkpoints
    from lm_envs.benchmarks.run.suites import check_overrides
    from lm_envs.benchmarks.run.tracking import check_services
    from lm_envs.benchmarks.run.workers import PATIENCE_S, GivenUp, StopRequest
    from lm_envs.processes import group

    disable_progress_bar()
    check_overrides(spec.algorithm, spec.overrides)
    check_services(track)

    with gone_if_refused(out, *BEFORE_CONFIG), Display(console, 1) as shown:
        if settings_of(out) is not None and not resume:
            raise UserError(f"{out} holds a run already: --resume continues it, another --out starts a new run")

        def opener(spec: Any) -> DataProblem:
            opened = DataProblem(spec, out, lambda done: shown.say(f"{done:,} examples tokenized"))
            for line in [*_about(opened.info, out), opened.plan()]:
                shown.say(line)
            return opened

        try:
            patience = PATIENCE_S if group.count() == 1 else None
            with StopRequest(shown.say, patience).listening() as stop:
                threads = threads or group.threads()
                how: dict[str, Any] = {"threads": threads, "track": track, "notify": shown, "should_stop": stop}
                result = execute(spec, out, opener=opener, **how)
        except (Interrupted, GivenUp):
            shown({"event": "stopped", "run": spec.label, "iteration": Checkpoints(out / "checkpoints").last})
            raise
    _show(out, result)
    return result


def _about(info: dict[str, Any], out: Path) -> list[str]:
    """Lines about the rows that were read, and the first that were not."""
    lines = [f"{info['examples']:,} {info['kind']} of {info['rows']:,} rows ({info['convention']}, {info['format']})"]
    if info["unwanted"]:
        lines.append(f"{info['unwanted']:,} rows left out: their label says that the completion is not wanted")
    if info["skipped"]:
        shown = [f"  {where}: {reason}" for where, reason in info["skipped_rows"][:_SHOWN]]
        more = f"; the rest is in {out / 'data' / 'info.json'}" if info["skipped"] > len(shown) else ""
        lines += [f"{info['skipped']:,} bad rows skipped{more}:", *shown]
    return lines


def _show(out: Path, result: dict[str, Any]) -> None:
    """Print the figures on held-out rows before and after, and where the model is."""
    from lm_envs.benchmarks.run.storage import Records

    before = next(iter(Records(out / "metrics.jsonl").read()), {})
    names = [name.removeprefix("held_out_") for name in result if name.startswith("held_out_")]
    console = Console(emoji=False)
    if names:
        table = Table("held-out", "before", "after", box=None, pad_edge=False)
        for name in names:
            old = before.get(f"validation_{name}")
            table.add_row(name, "" if old is None else f"{old:.4g}", f"{result[f'held_out_{name}']:.4g}")
        console.print(table)
    if rows := result.get("calibration"):
        show_tables({"Held-out pairs by the margin of their scores": rows})
    print(out / "model")
