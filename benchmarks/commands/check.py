"""The options of ``lm-envs check``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.suites import parse_settings


@dataclass(frozen=True)
class Check:
    """Check an algorithm, a task or a reward of your own by this library's contract tests.

      lm-envs check my_algo.py:CISPO --set clip=0.3
      lm-envs check my_task.py:load
      lm-envs check 'my_reward.py:brevity*0.5'

    Prints a line for each check, with what is wrong; exits with 1 if one fails. docs/plug_in.md explains them.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """FILE.py:NAME, module:NAME, or a name that `lm-envs tasks` lists. Its code is executed."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A setting of the algorithm, an option of the task's loader, or a column that the reward receives (the same for
    every sample); may be repeated."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.run.contracts import run

        failed = 0
        for name, state, why in run(self.name, parse_settings(self.set)):
            failed += state == "FAIL"
            print(f"{state}  {name}{': ' * bool(why)}{why}", flush=True)
        if failed:
            raise UserError(f"{self.name}: {failed} check{'s' * (failed > 1)} failed")
