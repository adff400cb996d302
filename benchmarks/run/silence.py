"""Where nothing is said for a while, a line about what is under way: models that load, and long iterations."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Self

AFTER_S = 20.0


class Silence:
    """Breaks silence: says what is under way, and for how long, after :data:`AFTER_S` seconds without a word.

    Args:
        say: prints a line; from a thread.
        otherwise: what is under way while nothing is named.
    """

    def __init__(self, say: Callable[[str], None], otherwise: str) -> None:
        self._say, self._otherwise, self._after_s = say, otherwise, AFTER_S
        self._doing: dict[str, tuple[str, float]] = {}
        self._heard = self._began = monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def heard(self) -> None:
        """Something was said."""
        self._heard = monotonic()

    def begin(self, who: str, what: str) -> None:
        """From now on ``who`` does ``what``."""
        self._doing = {**self._doing, who: (what, monotonic())}

    def end(self, who: str) -> None:
        """``who`` is done."""
        self._doing = {name: doing for name, doing in self._doing.items() if name != who}
        self._began = monotonic()

    def _watch(self) -> None:
        while not self._over.wait(self._after_s / 20):
            now = monotonic()
            if now - self._heard >= self._after_s:
                doing = self._doing or {"": (self._otherwise, self._began)}
                lines = (
                    f"{who + ': ' if who else ''}{what}, {now - t:.0f} s so far" for who, (what, t) in doing.items()
                )
                self._say("\n".join(lines))
                self.heard()
