"""What the terminal shows while runs go on: bars with the figures that matter, or plain lines where there is no
terminal."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lm_envs.benchmarks.run.results import number, plain


def figures(metrics: dict[str, Any]) -> str:
    """``gold 0.31  proxy 0.52  KL 3.1  9.8k tok/s``, of what an iteration's metrics hold."""
    parts = []
    names = (
        ("return", ("return", "validation_return")),
        ("gold", ("validation_gold",)),
        ("proxy", ("score", "validation_proxy")),
        ("KL", ("kl", "validation_kl")),
        ("loss", ("nll", "ranking_loss", "dpo_loss")),
        ("held-out loss", ("validation_loss",)),
        ("held-out accuracy", ("validation_accuracy",)),
    )
    for title, keys in names:
        value = next((metrics[key] for key in keys if metrics.get(key) is not None), None)
        if value is not None and value == value and not (title == "return" and "score" in metrics):
            parts.append(f"{title} {plain(value, 2)}")
    if metrics.get("tokens_per_second"):
        parts.append(f"{metrics['tokens_per_second'] / 1000:.1f}k tok/s")
    return "  ".join(parts)


def final_figures(result: dict[str, Any]) -> str:
    """The result in the form of :func:`figures`."""
    win_rate, gold, proxy, kl = (number(result[name]) for name in ("win_rate", "gold", "proxy", "kl"))
    text = f"proxy {proxy:.2f}"
    if kl == kl:
        text += f"  KL {'≤' if result.get('kl_is_bound') else ''}{plain(kl, 1)}"
    return text if gold != gold else f"win-rate {100 * win_rate:.0f} %  gold {gold:.2f}  {text}"


class Display:
    """Follows the events of :mod:`lm_envs.benchmarks.run.one_run` in plain lines: a start, a line now and then and for
    the last iteration, an end."""

    def __init__(self, console: Console, total: int, every_s: float = 15.0) -> None:
        self.console, self.total, self.every_s = console, total, every_s
        self._last: dict[str, float] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def known(self, event: dict[str, Any]) -> dict[str, Any]:
        """The newest of each metric of a run, with those of an iteration's event."""
        known = self._known.setdefault(event["run"], {})
        known.update(event["metrics"])
        return known

    def __call__(self, event: dict[str, Any]) -> None:
        kind, run = event["event"], event.get("run", "")
        if kind == "start" and event["iteration"]:
            self.say(f"{run}: continuing after iteration {event['iteration']}")
        elif kind == "iteration":
            known, now = self.known(event), time.monotonic()
            last = event["metrics"]["iteration"] == event["of"]
            if last or now - self._last.get(run, -self.every_s) >= self.every_s:
                self._last[run] = now
                self.say(f"{run}: iteration {event['metrics']['iteration']}/{event['of']}  {figures(known)}")
        elif kind == "done":
            self._done += 1
            self.say(f"{run}: done ({self._done}/{self.total})  {final_figures(event['result'])}")
        elif kind == "stopped":
            self.say(f"{run}: stopped, saved")
        elif kind == "failed":
            self.say(f"{run}: FAILED: {event['message']}")


class Bars(Display):
    """A bar per run under way and one for the whole."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, total)
        self.progress = Progress(
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}", style="cyan"),
            console=console,
        )
        self._all = self.progress.add_task("[bold]all runs", total=total, figures="")
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        kind, run = event["event"], event.get("run", "")
        if kind == "start":
            row = self._rows.get(run)
            if row is None:
                row = self._rows[run] = self.progress.add_task(escape(run), total=max(event["of"], 1), figures="")
            self.progress.update(row, completed=event["iteration"])
        elif kind == "iteration":
            shown = figures(self.known(event))
            self.progress.update(self._rows[run], completed=event["metrics"]["iteration"], figures=shown)
        elif kind == "evaluate" and run in self._rows:
            self.progress.update(self._rows[run], figures="measuring on test prompts")
        elif kind in ("done", "stopped", "failed"):
            row = self._rows.pop(run, None)
            if row is not None:
                self.progress.remove_task(row)
            mark = {"done": "✓", "stopped": "‖", "failed": "✗"}[kind]
            text = final_figures(event["result"]) if kind == "done" else event.get("message", "stopped, saved")
            self.say(f"{mark} {run}  {text}")
            self.progress.advance(self._all, kind == "done")


def display(console: Console, total: int) -> Display:
    """Bars in a terminal, else lines."""
    return (Bars if console.is_terminal else Display)(console, total)
