"""The display of runs under way: bars with the figures that matter, or plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lm_envs.benchmarks.run.results import number, plain
from lm_envs.benchmarks.run.silence import Silence
from lm_envs.printable import one_line

PROMPT, RESPONSE = 50, 120  # characters of a sample that are shown


def figures(metrics: dict[str, Any]) -> str:
    """Return ``gold 0.31  proxy 0.52  KL 3.1  9.8k tok/s`` from the metrics of an iteration."""
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
    if rate := metrics.get("tokens_per_second"):
        parts.append(f"{rate / 1000:.1f}k tok/s" if rate >= 1000 else f"{rate:.{int(rate < 10)}f} tok/s")
    return "  ".join(parts)


def left(metrics: dict[str, Any], total: int) -> str:
    """Return the time that the rest of the iterations takes at the pace so far, ``about 12 min left``; empty where that
    is unknown or nothing is left."""
    done, spent = metrics.get("iteration") or 0, metrics.get("wall_s") or 0.0
    if not 0 < done < total or not spent:
        return ""
    seconds = spent / done * (total - done)
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


def final_figures(result: dict[str, Any]) -> str:
    """Return the result in the form of :func:`figures`."""
    win_rate, gold, proxy, kl = (number(result[name]) for name in ("win_rate", "gold", "proxy", "kl"))
    text = f"proxy {proxy:.2f}"
    if kl == kl:
        text += f"  KL {'≤' if result.get('kl_is_bound') else ''}{plain(kl, 1)}"
    return text if gold != gold else f"win-rate {100 * win_rate:.0f} %  gold {gold:.2f}  {text}"


def _stopped(saved: int) -> str:
    return (
        f"stopped, saved after iteration {saved}" if saved else "stopped before a checkpoint: --resume begins it again"
    )


def sample_line(text: dict[str, Any]) -> str:
    """Return one printable line with the score, the end of the prompt and the beginning of the response of a sample."""
    score, prompt = number(text["score"]), one_line(text["prompt"][-1000:], 10_000)
    prompt = prompt if len(prompt) <= PROMPT else f"...{prompt[3 - PROMPT :]}"
    return f"  {'–' if math.isnan(score) else plain(score, 2):>6}  {prompt} | {one_line(text['response'], RESPONSE)}"


class Display:
    """Shows the events of :mod:`lm_envs.benchmarks.run.one_run`: in a terminal a bar per run under way and one for the
    whole; elsewhere a line now and then, and after 20 silent seconds. Starts and ends of runs are lines in both."""

    def __init__(self, console: Console, total: int, every_s: float = 15.0) -> None:
        self.console, self.total, self.every_s = console, total, every_s
        self._last: dict[str, float] = {}
        self._known: dict[str, dict[str, Any]] = {}  # the newest of each metric of a run
        self._rows: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}", style="cyan"),
            console=console,
            disable=not console.is_terminal,
        )
        self._silence = Silence(self._print, "opening models and reading the data")
        self._all = self.progress.add_task("[bold]all runs", total=total, figures="")

    def __enter__(self) -> Self:
        self.progress.start()
        if self.progress.disable:  # elsewhere a clock runs
            self._silence.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        if self.progress.disable:
            self._silence.__exit__()

    def say(self, text: str) -> None:
        self._print(text)
        self._silence.heard()

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __call__(self, event: dict[str, Any]) -> None:
        kind, run = event["event"], event.get("run", "")
        if kind == "start":
            if run not in self._rows:
                self._rows[run] = self.progress.add_task(escape(run), total=max(event["of"], 1), figures="")
            self.progress.update(self._rows[run], completed=event["iteration"])
            self._silence.begin(
                run, f"iteration {event['iteration'] + 1}/{event['of']}" if event["of"] else "measuring"
            )
            if event["iteration"]:
                self.say(f"{run}: continuing after iteration {event['iteration']}")
        elif kind == "iteration":
            self._iteration(run, event["metrics"], event["of"])
        elif kind == "texts":
            lines = [sample_line(text) for text in event["texts"]]
            self.say("\n".join([f"{run}: texts of iteration {event['iteration']}", *lines]))  # one write: never torn
        elif kind == "ended":
            fell = event["kind"] == "collapsed"
            told = f"collapsed ({event['why']}): training stops here; [guards] in a suite, or --guard"
            self.say(f"{run}: {told if fell else 'stopped: ' + event['why']}")
        elif kind == "evaluate" and run in self._rows:
            self._silence.begin(run, "measuring on test prompts")
            self.progress.update(self._rows[run], figures="measuring on test prompts")
        elif kind == "lost":
            self.say(f"{run}: its node was lost; it goes on elsewhere from its last checkpoint")
        elif kind in ("done", "stopped", "failed"):
            self._silence.end(run)
            if run in self._rows:
                self.progress.remove_task(self._rows.pop(run))
            self.progress.advance(self._all, kind == "done")
            if kind == "done":
                done = f"done ({self.progress.tasks[0].completed:.0f}/{self.total})"
                self.say(f"{run}: {done}  {final_figures(event['result'])}")
            else:
                self.say(
                    f"{run}: {_stopped(event['iteration']) if kind == 'stopped' else 'FAILED: ' + event['message']}"
                )

    def _iteration(self, run: str, metrics: dict[str, Any], total: int) -> None:
        known = self._known.setdefault(run, {})
        known |= metrics
        self._silence.begin(run, f"iteration {min(metrics['iteration'] + 1, total)}/{total}")
        if run in self._rows:
            shown = "  ".join(filter(None, (figures(known), left(known, total))))
            self.progress.update(self._rows[run], completed=metrics["iteration"], figures=shown)
        now, last = time.monotonic(), self._last.get(run, -self.every_s)
        if self.progress.disable and (metrics["iteration"] == total or now - last >= self.every_s):
            self._last[run] = now
            more = filter(None, (figures(known), left(known, total)))
            self.say(f"{run}: iteration {metrics['iteration']}/{total}  {'  '.join(more)}")
