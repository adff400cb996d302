"""The options of ``lm-envs train``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from lm_envs.benchmarks.commands.options import Running
from lm_envs.benchmarks.commands.report import carry_out
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.suites import Plan, Suite, TaskSettings, parse_settings
from lm_envs.settings import Count, Rate, Seed, Threads, Whole


@dataclass(frozen=True, kw_only=True)
class Train(Running):
    """Train one algorithm on one task with one seed; control environments too.

      lm-envs train --task reviews --algorithm ppo --out runs/ppo --set learning_rate=1e-3
      lm-envs train --task CartPole-v1 --algorithm a2c --iterations 200 --out runs/cartpole
      lm-envs train --policy DIR --reward-model DIR --prompts FILE --algorithm ppo --out runs/own

    OUT holds what a comparison's folder does, for one run: runs/ppo/reviews/ppo/seed-0/, and the tuned model in it.
    """

    algorithm: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """An algorithm (`lm-envs tasks` lists them)."""
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A task (`lm-envs tasks` lists them) or the id of a Gymnasium environment with discrete actions; not needed if the
    options below make one."""
    seed: Seed = 0
    """Seed of prompts, samples and the order of minibatches."""
    learning_rate: Annotated[Rate | None, tyro.conf.arg(metavar="X")] = None
    """Adam's step size at the start; the algorithm's own if not given."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Another setting of the algorithm, as in --set epochs=2; may be repeated."""
    validate_every: Whole = Plan.validate_every
    """Iterations between points of the learning curve, 0 for none."""
    checkpoint_every: Count = Plan.checkpoint_every
    """Iterations between checkpoints."""
    threads: Annotated[Threads | None, tyro.conf.arg(metavar="N")] = None
    """Torch threads of each process; all cores if not given. The last bits of results may depend on it."""

    def to_suite(self) -> Suite:
        """Return the comparison of one run that the options describe."""
        settings = parse_settings(self.set)
        if self.learning_rate is not None:
            if "learning_rate" in settings:
                raise UserError("--learning-rate and --set learning_rate are the same setting: give one")
            settings["learning_rate"] = self.learning_rate
        overrides = {self.algorithm: settings} if settings else {}
        own = self.own.options()
        task = self.task or (next(iter(own)) if len(own) == 1 else None)
        if task is None:
            raise UserError("say what to train on: --task NAME, or --policy, --prompts and --reward-model or --reward")
        suite = Suite("training", (TaskSettings(task),), (self.algorithm,), (self.seed,), overrides=overrides)
        plan = {"validate_every": self.validate_every, "checkpoint_every": self.checkpoint_every}
        return self.applied(suite, own, **plan)

    def run(self, console: Console) -> None:
        from lm_envs.processes import group

        threads = group.threads() if self.threads is None else self.threads
        suite = self.to_suite()
        carry_out(suite, self.out, **self.how(), threads=threads, console=console)
        model = self.out / suite.runs()[0].label / "model"
        if model.is_dir():
            print(model)
