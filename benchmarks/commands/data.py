"""The options of ``lm-envs data check``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console

from lm_envs.benchmarks.errors import UserError
from lm_envs.settings import Count


@dataclass(frozen=True)
class DataCheck:
    """Check a file of prompts, demonstrations, labels or preferences, and report its contents and its faults.

      lm-envs data check preferences.jsonl --tokenizer DIR

    It prints the convention and the columns, how many rows are usable and how long they are, duplicates, and the bad
    rows with their line and the reason. Exits with 1 if no row is usable.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """JSONL, CSV, Parquet, a folder of them, or OWNER/NAME[/CONFIG][:SPLIT] of the hub."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """The tokenizer to count tokens with: a folder of save_pretrained, or a hub name; without one, count characters."""
    use: Literal["prompts", "demonstrations", "judgments", "preferences"] | None = None
    """The use of the rows; decided by their columns if not given."""
    max_length: Annotated[Count | None, tyro.conf.arg(metavar="N")] = None
    """Rows with more tokens are bad."""
    max_rows: Annotated[Count | None, tyro.conf.arg(metavar="N")] = None
    """Read no more rows."""
    all_bad: bool = False
    """List all bad rows, not the first ten."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.commands.data_check import check, show
        from lm_envs.feedback.exchange import rows_of

        if self.max_length is not None and self.tokenizer is None:
            raise UserError("--max-length counts tokens: give --tokenizer too")
        tokenizer = None
        if self.tokenizer is not None:
            from lm_envs.model.loading import load_tokenizer

            tokenizer = load_tokenizer(self.tokenizer, "tokenizer")
        report = check(rows_of(self.file), tokenizer, kind=self.use, max_rows=self.max_rows, max_length=self.max_length)
        show(report, all_bad=self.all_bad)
        if not report.usable:
            raise SystemExit(1)


@dataclass(frozen=True)
class DataCommand:
    """Check a file of data, and report its contents and its faults: `lm-envs data check FILE`."""

    what: Annotated[
        Annotated[DataCheck, tyro.conf.subcommand("check", prefix_name=False)] | Annotated[None, tyro.conf.Suppress],
        tyro.conf.arg(name=""),
    ]

    def run(self, console: Console) -> None:
        assert self.what is not None
        self.what.run(console)
