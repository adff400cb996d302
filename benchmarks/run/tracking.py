"""The TensorBoard log of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# TensorBoard shows what people look at first under "main", the rest of an algorithm's metrics under "update".
_MAIN = ("return", "score", "gold", "proxy", "kl", "kl_coef", "entropy", "length", "tokens_per_second")
_COUNTERS = ("tokens", "episodes", "steps", "reward_calls", "trained_tokens", "iteration")


def _made(path: Path) -> int:
    """The second in which an event file was made; 0 if its name has none, or one in the future."""
    made = path.name.split(".")[3]
    return int(made) if made.isdigit() and int(made) <= time.time() else 0


class Untracked:
    """Logs nothing: the tracker of processes after the first."""

    def scalars(self, *args: Any) -> None:
        return None

    def texts(self, *args: Any) -> None:
        return None

    def close(self) -> None:
        return None


class Tracker:
    """Writes scalars and sample texts of one run; hides what a killed process logged after iteration ``resumed_at``."""

    def __init__(self, folder: Path, resumed_at: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers sort the files by their names, which begin with the second they were made in: a file that hides what
        # another one holds has to come after it.
        while any(int(time.time()) <= _made(path) for path in folder.glob("events.out.tfevents.*")):
            time.sleep(0.05)
        # Only a fresh start logs iteration 0; a process that was killed before its first checkpoint left it.
        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else 0, flush_secs=30)

    def scalars(self, metrics: Mapping[str, Any], iteration: int, prefix: str | None = None) -> None:
        """Log the finite numbers among ``metrics``; ``prefix`` None sorts them into main, counters and update."""
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and math.isfinite(value) and name != "iteration":
                group = prefix or ("main" if name in _MAIN else "counters" if name in _COUNTERS else "update")
                self._writer.add_scalar(f"{group}/{name}", value, iteration)

    def texts(self, texts: Sequence[str], iteration: int, tag: str) -> None:
        """Log sample texts as one block, a line each."""
        if texts:
            self._writer.add_text(tag, "\n".join("    " + line.replace("\n", " ") for line in texts), iteration)

    def close(self) -> None:
        self._writer.close()
