"""``lm-envs bench``: the options of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from lm_envs.benchmarks.speed.settings import SB3, Memory, Throughput
from lm_envs.settings import Count, Size, Threads


@dataclass(frozen=True)
class BenchThroughput(Throughput):
    """Measure tokens a second and peak memory of stepping, bulk sampling and training, against `generate`, bare
    forwards and, after `make peers`, TRL's trainers on the same work.

    One line per way and size; the ways take turns, and what others took of the machine stands beside them.
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.csv")] = None
    """The result; if not given, benchmarks/results/throughput-DEVICE.csv, or DEVICE-POLICY with an OMP_WAIT_POLICY."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.speed import throughput

        throughput.run(self, self.out)


@dataclass(frozen=True)
class BenchKernels:
    """Measure the vocabulary kernels against plain torch, torch.compile, other libraries and a roofline.

    One line per variant, direction and size; docs/kernels.md says what they mean.
    """

    device: Literal["cpu", "cuda"] | None = None
    """Where; on CUDA if it is there."""
    rows: Annotated[Size | None, tyro.conf.arg(metavar="N")] = None
    """Tokens; 8192 on CUDA, 2048 on a CPU."""
    vocabularies: Annotated[tuple[Size, ...], tyro.conf.arg(metavar="V ...")] = ()
    """Sizes of the vocabulary."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()
    """Data types of the logits."""
    width: Annotated[Size | None, tyro.conf.arg(metavar="H")] = None
    """Width of the hidden states, for the linear form."""
    forms: tuple[Literal["single", "dual", "linear"], ...] = ()
    """One model or two, from logits; or both, from hidden states."""
    variants: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Only these."""
    rounds: Count = 5
    """On a CPU, processes per variant."""
    threads: Annotated[Threads | None, tyro.conf.arg(metavar="N")] = None
    """On a CPU; all cores if not given."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.csv")] = None
    """The result; benchmarks/results/kernels-DEVICE.csv if not given."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Also draw it."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.speed import kernels

        arguments = kernels.parser().parse_args([])
        for name, value in vars(self).items():
            if value is not None and value != ():
                setattr(arguments, name, value)
        kernels.run(arguments)


@dataclass(frozen=True)
class BenchMemory(Memory):
    """Measure time and peak memory of one update of a language model with a large vocabulary, beyond its weights and
    gradients.
    """

    against: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Another checkout of this project, measured in turns with this one."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.csv")] = None
    """The result; benchmarks/results/memory-cpu.csv if not given."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.speed import memory

        memory.run(self, self.against, self.out)


@dataclass(frozen=True)
class BenchSB3(SB3):
    """Measure Stable-Baselines3's PPO with our policy against our own PPO on the same work; they take turns."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.csv")] = None
    """The result; benchmarks/results/sb3-cpu.csv if not given."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.speed import sb3

        sb3.run(self, self.out)


@dataclass(frozen=True)
class Bench:
    """Measure what this machine does: the kernels, the whole path, or another library beside ours."""

    what: Annotated[
        Annotated[BenchKernels, tyro.conf.subcommand("kernels", prefix_name=False)]
        | Annotated[BenchThroughput, tyro.conf.subcommand("throughput", prefix_name=False)]
        | Annotated[BenchMemory, tyro.conf.subcommand("memory", prefix_name=False)]
        | Annotated[BenchSB3, tyro.conf.subcommand("sb3", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def run(self, console: Console) -> None:
        self.what.run(console)
