"""``lm-envs bench``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated

import tyro
from rich.console import Console

from lm_envs.benchmarks.speed.settings import SB3, Kernels, Memory, Plan, Scale, Throughput


@dataclass(frozen=True)
class Bench:
    """Measure what this machine does: the kernels, the whole path, many processes, plans, or another library beside
    ours."""

    what: Annotated[
        Annotated[Kernels, tyro.conf.subcommand("kernels", prefix_name=False)]
        | Annotated[Throughput, tyro.conf.subcommand("throughput", prefix_name=False)]
        | Annotated[Memory, tyro.conf.subcommand("memory", prefix_name=False)]
        | Annotated[Scale, tyro.conf.subcommand("scale", prefix_name=False)]
        | Annotated[Plan, tyro.conf.subcommand("plan", prefix_name=False)]
        | Annotated[SB3, tyro.conf.subcommand("sb3", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def run(self, console: Console) -> None:
        import_module(f"lm_envs.benchmarks.speed.{type(self.what).__name__.lower()}").run(self.what)
