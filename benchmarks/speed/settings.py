"""The commands of ``lm-envs bench``, apart from what they measure, so that the command line loads none of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lm_envs.settings import Count, Several, Size, Threads

Shape = Literal["small", "larger", "gpt2", "smollm2"]
Shapes = tuple[Shape, ...]
Table = Literal["fixed work", "response length", "rows", "vocabulary"]
Csv = Annotated[Path | None, tyro.conf.arg(metavar="FILE.csv")]
Ways = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]


@dataclass(frozen=True)
class Kernels:
    """Measure the vocabulary kernels against plain torch, torch.compile, other libraries and a roofline.

    One line per variant, direction and size; docs/kernels.md says what they mean.
    """

    device: Literal["cpu", "cuda"] | None = None
    """Device to measure on; if not given, CUDA if there is a GPU."""
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
    variants: Ways = ()
    """Measure only these implementations."""
    rounds: Count = 5
    """Processes per variant on a CPU."""
    threads: Annotated[Threads | None, tyro.conf.arg(metavar="N")] = None
    """Torch threads on a CPU; all cores if not given."""
    out: Csv = None
    """File of the result; benchmarks/results/kernels-DEVICE.csv if not given."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Also draw the result into this file."""


@dataclass(frozen=True)
class Throughput:
    """Measure tokens a second and peak memory of stepping, bulk sampling and training, against `generate`, bare
    forwards and, after `make peers`, TRL's trainers on the same work.

    One line per way and size. The ways take turns, and each line says how much of the machine other processes took.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    """Device to measure on."""
    shapes: Shapes = ("small", "larger")
    """Models: 4 x 128 with 1000 tokens, 6 x 256 with 8192, GPT-2's own shape, SmolLM2's (135 M). The other tables use
    the first."""
    rows: Size = 32
    """Texts of the fixed work."""
    new_tokens: Size = 48
    """Exact length of its texts in tokens."""
    ways: Ways = ()
    """Measure only these ways."""
    rounds: Count = 7
    """Runs of each way; medians are reported."""
    threads: Threads = os.cpu_count() or 1
    """Torch threads."""
    tables: tuple[Table, ...] = ("fixed work", "response length", "rows", "vocabulary")
    """The fixed work, and the first model over response length, rows and vocabulary."""
    peaks: bool = True
    """Measure peak memory too, for each way in a process of its own."""
    add: bool = False
    """Keep the lines of the result that are not measured again, so that it can be made piece by piece."""
    out: Csv = None
    """File of the result; if not given, benchmarks/results/throughput-DEVICE.csv, or DEVICE-POLICY with an
    OMP_WAIT_POLICY."""


@dataclass(frozen=True)
class Memory:
    """Measure time and peak memory of one update of a language model with a large vocabulary, beyond its weights and
    gradients.
    """

    rows: Size = 8
    """Texts."""
    tokens: Size = 256
    """Tokens per row."""
    layers: Size = 4
    """Layers of the model."""
    vocabulary: Size = 49_152
    """Tokens of the model's vocabulary."""
    threads: Threads = os.cpu_count() or 1
    """Torch threads."""
    rounds: Count = 3
    """Processes per task and way; medians are reported."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Another checkout of this project, measured in turns with this one."""
    out: Csv = None
    """File of the result; benchmarks/results/memory-cpu.csv if not given."""


@dataclass(frozen=True)
class Scale:
    """Measure one PPO iteration by several processes against the same by one, with the same threads per process, with
    copies of the weights and with shares (FSDP); and the memory of a process on 30 million parameters."""

    processes: tuple[Several, ...] = (2,)
    """Numbers of processes."""
    shape: Shape = "larger"
    """Model: 4 x 128 with 1000 tokens, 6 x 256 with 8192, GPT-2's own shape, SmolLM2's."""
    rows: Size = 64
    """Texts an iteration, of all processes together."""
    new_tokens: Size = 48
    """Exact length of the texts in tokens."""
    threads: Threads = 1
    """Torch threads per process."""
    iterations: Count = 2
    """Iterations per measurement, after one that is not counted."""
    rounds: Count = 3
    """Measurements of each way; medians are reported."""
    parts: bool = False
    """Measure instead, in processor time, what does not shrink with the number of processes."""
    out: Csv = None
    """File of the result; benchmarks/results/scale-cpu.csv, or scale-parts-cpu.csv, if not given."""


@dataclass(frozen=True)
class Plan:
    """Measure how far `lm-envs plan` is from real runs of PPO, in memory (of the process that takes the most) and in
    time: of a model trained whole, by LoRA, in its upper layers, in bfloat16, and whole by two processes with --fsdp.
    """

    configurations: tuple[Literal["full", "lora", "frozen layers", "bfloat16", "fsdp"], ...] = ()
    """Measure only these."""
    width: Size = 512
    """Width of the models' hidden states."""
    layers: Size = 8
    """Layers of the models."""
    vocabulary: Size = 8192
    """Tokens of their vocabulary."""
    episodes: Size = 16
    """Texts an iteration."""
    micro_batch: Size = 8
    """Texts per forward."""
    new_tokens: Size = 32
    """Exact length of the texts in tokens."""
    iterations: Several = 3
    """Iterations of each run; the first does not count in its time."""
    threads: Threads = 1
    """Torch threads."""
    out: Csv = None
    """File of the result; benchmarks/results/plan-cpu.csv if not given."""


@dataclass(frozen=True)
class SB3:
    """Measure Stable-Baselines3's PPO with our policy against our own PPO on the same work; they take turns."""

    shapes: Shapes = ("small", "larger")
    """Models: 4 x 128 with 1000 tokens, 6 x 256 with 8192, GPT-2's own shape, SmolLM2's."""
    rows: Size = 32
    """Texts an iteration."""
    new_tokens: Size = 48
    """Exact length of the texts in tokens."""
    epochs: Count = 4
    """Passes over each buffer."""
    minibatches: Count = 4
    """Minibatches per buffer of one additional way on the first shape; 1 leaves it out."""
    rounds: Count = 5
    """Runs of each way; medians are reported."""
    threads: Threads = 1
    """Torch threads."""
    out: Csv = None
    """File of the result; benchmarks/results/sb3-cpu.csv if not given."""
