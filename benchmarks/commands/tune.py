"""The options of ``lm-envs tune``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from lm_envs.benchmarks.commands.compare import Compare
from lm_envs.benchmarks.commands.report import carry_out
from lm_envs.settings import Count


@dataclass(frozen=True, kw_only=True)
class Tune(Compare):
    """Tune every method of a comparison by the same number of trials on validation prompts, then run the comparison
    with the best settings on the test prompts.

      lm-envs tune --suite demo --trials 20 --out runs/tuned
      lm-envs tune --task reviews --algorithms sft best-of-16 reinforce ppo --trials 20 --out runs/mine

    OUT then holds trials.csv, trials/ and, in test/, the comparison. A suite says in [tune.ppo] what is tried; else it
    is the learning rate, and for methods that have them epochs, clip, lam and beta. --resume continues after Ctrl-C.
    """

    trials: Annotated[Count, tyro.conf.arg(metavar="N")] = 20
    """Trials of every method; the first has the comparison's own settings."""
    trial_seeds: Annotated[Count, tyro.conf.arg(metavar="N")] = 1
    """Training seeds of a trial; none is a seed of the comparison."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.run.tuning import tune

        suite = self.to_suite()
        how = {**self.how(), **self.where(), "console": console}
        trials = {name: value for name, value in how.items() if name != "extend"}
        tuned = tune(suite, self.out, trials=self.trials, seeds=self.trial_seeds, **trials)
        test = self.out / "test"
        carry_out(tuned, test, **how | {"resume": self.resume and test.exists()})
        console.print(self.out / "trials.csv", highlight=False, markup=False, soft_wrap=True)
