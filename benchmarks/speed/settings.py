"""Options of the benchmarks, apart from what they measure, so that the command line need not load that."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lm_envs.settings import Count, Size, Threads

Shapes = tuple[Literal["small", "larger", "gpt2"], ...]


@dataclass(frozen=True)
class Throughput:
    """What is measured of the whole path."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    shapes: Shapes = ("small", "larger")
    """Models: 4 x 128 with 1000 tokens, 6 x 256 with 8192, GPT-2's own shape. The first is scaled."""
    ways: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Only these."""
    rounds: Count = 7
    """How often each runs; medians are reported."""
    threads: Threads = os.cpu_count() or 1
    """Torch threads."""
    tables: tuple[Literal["fixed work", "response length", "rows", "vocabulary"], ...] = (
        "fixed work",
        "response length",
        "rows",
        "vocabulary",
    )
    """The fixed work, and the first model over response length, rows and vocabulary."""
    peaks: bool = True
    """Measure peak memory, for each way in a process of its own."""
    add: bool = False
    """Keep what stands in the result and is not measured again, so that it can be made piece by piece."""


@dataclass(frozen=True)
class SB3:
    """What is measured of Stable-Baselines3's PPO and ours."""

    shapes: Shapes = ("small", "larger")
    """Models: 4 x 128 with 1000 tokens, 6 x 256 with 8192, GPT-2's own shape."""
    rows: Size = 32
    """Texts an iteration."""
    new_tokens: Size = 48
    """Their exact length."""
    epochs: Count = 4
    """Passes over each buffer."""
    minibatches: Count = 4
    """Minibatches per buffer of one additional way on the first shape; 1 leaves it out."""
    rounds: Count = 5
    """How often each runs; medians are reported."""
    threads: Threads = 1
    """Torch threads."""


@dataclass(frozen=True)
class Memory:
    """A batch, and a model of SmolLM2-135M's width."""

    rows: Size = 8
    """Texts."""
    tokens: Size = 256
    """Tokens per row."""
    layers: Size = 4
    """Layers of the model."""
    vocabulary: Size = 49_152
    """Its tokens."""
    threads: Threads = os.cpu_count() or 1
    """Torch threads."""
    rounds: Count = 3
    """Processes per task and way; medians are reported."""
