"""``lm-envs report``, and the end of every comparison: its table and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from lm_envs.benchmarks.errors import RunsFailed, UserError
from lm_envs.benchmarks.run.suites import Suite
from lm_envs.feedback.store import open_study


@dataclass(frozen=True)
class Report:
    """Write results.csv, aggregate.csv, the plots and report.html of a folder again, from the finished runs.

      lm-envs report runs/mine
      lm-envs report runs/monday runs/tuesday --out runs/both

    Several folders are merged first: their runs are linked into OUT, and a run that stands in two of them counts once.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR ...")]
    """Folders of comparisons."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """New folder for the merged comparison; needed for several folders."""
    people: Annotated[Path | None, tyro.conf.arg(metavar="STUDY")] = None
    """Set what people said in a study of its test samples beside what the judge did (docs/people.md); writes people.csv
    too."""
    show: bool = False
    """Show sample texts of tasks whose texts may offend, too."""

    def run(self, console: Console) -> None:
        if not self.folders:
            raise UserError("say which comparison: lm-envs report DIR")
        for folder in self.folders:
            if not folder.is_dir():
                raise UserError(f"no such folder: {folder}")
        if self.out is None and len(self.folders) > 1:
            raise UserError(f"{len(self.folders)} folders make a new comparison: say where with --out DIR")
        if self.out is not None:
            from lm_envs.benchmarks.run.merge import merge

            for note in merge(self.folders, self.out):
                console.print(note, highlight=False, markup=False, soft_wrap=True)
        show(self.out or self.folders[0], self.people, self.show)


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


def show(out: Path, people: Path | None = None, sensitive: bool = False) -> None:
    """Write the report of a folder, beside what people said in a study, and print its table.

    Args:
        sensitive: show sample texts of sensitive tasks too.
    """
    from lm_envs.benchmarks.report.html import write_report
    from lm_envs.benchmarks.report.human import add_people
    from lm_envs.benchmarks.run.compare import write_results
    from lm_envs.benchmarks.run.results import rich_table, table

    rows = write_results(out)
    made = [out / "results.csv", out / "aggregate.csv"]
    if people is not None:
        made.append(add_people(out, rows, open_study(people).judgments()))
    path = write_report(out, rows, sensitive)
    console = Console(emoji=False)
    if not console.is_terminal:
        console = Console(emoji=False, width=160)
    console.print(rich_table(table(rows), console.width))
    console.print("\n".join(map(str, [*made, path])), highlight=False, markup=False, soft_wrap=True)
