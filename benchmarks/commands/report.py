"""``lm-envs report``, and the end of every comparison: its table and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from lm_envs.benchmarks.errors import RunsFailed, UserError
from lm_envs.benchmarks.run.suites import Suite


@dataclass(frozen=True)
class Report:
    """Write results.csv, the plots and report.html of a folder again, from the finished runs."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of a comparison."""

    def run(self, console: Console) -> None:
        if not self.out.is_dir():
            raise UserError(f"no such folder: {self.out}")
        show(self.out)


def carry_out(suite: Suite, out: Path, **options: Any) -> None:
    """Run a comparison and show its results; if some runs failed, those of the others."""
    from lm_envs.benchmarks.run.compare import compare

    try:
        compare(suite, out, **options)
    except RunsFailed as error:
        if error.finished:
            show(out)
        raise
    show(out)


def show(out: Path) -> None:
    """Write the report of a folder and print its table."""
    from lm_envs.benchmarks.report.html import write_report
    from lm_envs.benchmarks.run.compare import write_results
    from lm_envs.benchmarks.run.results import rich_table, table

    rows = write_results(out)
    path = write_report(out, rows)
    console = Console(emoji=False)
    if not console.is_terminal:
        console = Console(emoji=False, width=160)
    console.print(rich_table(table(rows), console.width))
    console.print(f"{out / 'results.csv'}\n{path}", highlight=False, markup=False, soft_wrap=True)
