"""The options of ``lm-envs probe``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lm_envs.benchmarks.errors import UserError
from lm_envs.settings import Count, Names, Threads, Unique

EVERY_S = 20.0  # between lines of progress where there is no terminal


@dataclass(frozen=True)
class Probe:
    """Show what algorithms can and cannot do, on small text tasks whose optimum is known exactly.

      lm-envs probe --algorithms ppo rloo my_algo.py:CISPO --seeds 5 --jobs 2 --out runs/probes

    A probe is a sweep (of the horizon, of noise in the reward, of the KL coefficient ...), and its score is 0 where
    nothing is learned and 1 at the optimum. OUT then holds scores.csv, summary.csv, scores.md, report.html and plots/.
    After Ctrl-C the same command with --resume continues; runs that were under way begin again. docs/probes.md says
    more.
    """

    algorithms: Annotated[Names, Unique, tyro.conf.arg(metavar="NAME ...")]
    """Algorithms, FILE.py:NAME for one of your own, whose code is executed; "all" stands for each that trains."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the results."""
    probes: Annotated[Names | None, tyro.conf.arg(metavar="NAME ...")] = None
    """Probes, FILE.py:NAME for one of your own; all if not given."""
    seeds: Annotated[Count, tyro.conf.arg(metavar="N")] = 3
    """Number of seeds, from 0; each draws other tasks."""
    jobs: Threads = 1
    """Processes; results do not depend on it."""
    resume: bool = False
    """Continue what OUT holds, perhaps with more probes, algorithms or seeds."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.probes.registry import PROBES, load
        from lm_envs.benchmarks.probes.report import beyond, words, write_report
        from lm_envs.benchmarks.probes.running import Sweep, carry_out
        from lm_envs.benchmarks.run.names import check_algorithm, expanded, is_untrained

        algorithms = expanded(self.algorithms)
        if "all" in self.algorithms:
            algorithms = tuple(name for name in algorithms if not is_untrained(name))
        for name in algorithms:
            check_algorithm(name)
            if is_untrained(name):
                raise UserError(f"{name} does not train: probes are for algorithms that do")
        names = tuple(dict.fromkeys(self.probes or PROBES))
        for name in names:
            load(name)
        bars = (TextColumn("probes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*bars, console=console, transient=True, disable=not console.is_terminal) as shown:
            bar = shown.add_task("probes")
            last = monotonic()

            def notify(done: int, of: int) -> None:
                nonlocal last
                shown.update(bar, completed=done, total=of)
                if not console.is_terminal and monotonic() - last >= EVERY_S:
                    console.print(f"{done:,} of {of:,} runs", highlight=False)
                    last = monotonic()

            records = carry_out(
                Sweep(names, algorithms, tuple(range(self.seeds))),
                self.out,
                resume=self.resume,
                jobs=self.jobs,
                notify=notify,
            )
        if all(record["score"] is None for record in records):
            raise UserError(f"no probe suits: {records[0]['note']}")
        scores = write_report(records, self.out)
        said = [*(words(scores, name) for name in scores.algorithms), beyond(scores)]
        files = ("scores.csv", "summary.csv", "report.html")
        print("\n".join([*filter(None, said), *(str(self.out / name) for name in files)]))
