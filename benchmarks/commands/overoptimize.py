"""The options of ``lm-envs overoptimise``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from lm_envs.benchmarks.commands.options import Own
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.names import base_task
from lm_envs.benchmarks.run.suites import parse_settings
from lm_envs.plugins import installed
from lm_envs.settings import Seed, Several, near


@dataclass(frozen=True)
class Overoptimise:
    """Draw how far reward models of more and more data can be trusted: proxy and gold against the square root of KL.

      lm-envs overoptimise --task reviews --out runs/over

    OUT then holds overoptimisation.json and overoptimisation.png.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the results."""
    task: str = "reviews"
    """A task with a judge and a learned reward model."""
    pairs: Annotated[tuple[Several, ...], tyro.conf.arg(metavar="N ...")] = (500, 2000, 8000)
    """Comparisons that each reward model is trained on."""
    algorithm: str = "ppo"
    """The algorithm that optimizes them, apart from best-of-n."""
    iterations: Several = 60
    """Training iterations of the algorithm."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A setting of the algorithm, as in --set learning_rate=1e-3; may be repeated."""
    seed: Seed = 0
    """Seed of everything."""
    own: Annotated[Own, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="own task")] = Own()

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.report.overoptimization import Settings, overoptimise
        from lm_envs.benchmarks.run.names import trainable

        known = [*trainable(), *installed("algorithm")]
        if ":" not in self.algorithm and self.algorithm not in known:
            raise UserError(f"no algorithm {self.algorithm!r}: {near(self.algorithm, known)}")
        given = {name: getattr(self, name) for name in ("pairs", "algorithm", "iterations", "seed")}
        settings = Settings(**given, overrides=parse_settings(self.set))
        options = self.own.options().get(base_task(self.task)[0], {})
        curves = overoptimise(
            self.task, options, settings, self.out, lambda text: console.print(text, highlight=False, markup=False)
        )
        for c in curves:
            peak = max(range(len(c.gold)), key=c.gold.__getitem__)
            print(
                f"{c.pairs:>6} pairs, {c.method}: gold at most {c.gold[peak]:+.2f} at KL {c.kl[peak]:.1f}, "
                f"{c.gold[-1]:+.2f} at KL {c.kl[-1]:.1f}, where the proxy says {c.proxy[-1]:+.2f}; "
                f"alpha {c.fit['alpha']:.2f}, beta {c.fit['beta']:.2f}, r2 {c.fit['r2']:.2f}"
            )
        print(self.out / "overoptimisation.png")
