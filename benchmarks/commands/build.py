"""The options of ``lm-envs build``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.suites import parse_settings


@dataclass(frozen=True)
class Build:
    """Build the models and data of a task that comes with the package, or of a variant of it.

      lm-envs build reviews --out noisy --set flip=0.4

    It takes about a minute on 2 cores. In a suite, `options = {path = "noisy"}` under `[task.reviews]` loads the
    result.
    """

    task: Annotated[Literal["reviews"], tyro.conf.Positional]
    """The task."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A new or empty folder."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A field of lm_envs.tasks.reviews_build.ReviewsConfig; may be repeated."""

    def run(self, console: Console) -> None:
        from transformers.utils.logging import disable_progress_bar

        from lm_envs.tasks import reviews_build

        disable_progress_bar()  # those of writing files: ours show what takes time
        settings = parse_settings(self.set, example="flip=0.4")
        if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
            raise UserError(f"{self.out} is not an empty folder: name a new one with --out")
        reviews_build.build(self.out, **settings)
        print(self.out)
