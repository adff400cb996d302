"""The drawing of over-optimization, and the folder that holds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm_envs.benchmarks.report.plots import STYLE, as_png
from lm_envs.benchmarks.run.overoptimization import FLOOR, Curve, Settings, bend, measure
from lm_envs.benchmarks.run.storage import write_json

_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#0072B2")


def draw(curves: Sequence[Curve]) -> Figure:
    """A panel per method: gold (dots, its fit a line) and proxy (dashed) against the square root of the KL, a colour
    per reward model. Of what lies below :data:`FLOOR` only the beginning is shown.
    """
    methods = list(dict.fromkeys(curve.method for curve in curves))
    sizes = sorted({curve.pairs for curve in curves})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5 * len(methods), 4.6), layout="constrained")
        axes: Sequence[Axes] = figure.subplots(1, len(methods), squeeze=False)[0]
        for ax, method in zip(axes, methods, strict=True):
            shown = [c for c in curves if c.method == method]
            for curve in shown:
                colour, d = _COLOURS[sizes.index(curve.pairs) % len(_COLOURS)], np.sqrt(np.maximum(curve.kl, 0))
                label = f"{curve.pairs:,} pairs ({curve.accuracy:.0%} right)"
                ax.plot(d, curve.proxy, "--", color=colour, linewidth=1.2)
                ax.plot(d, curve.gold, "o", color=colour, markersize=3.5, label=label)
                if math.isfinite(curve.fit.get("alpha", math.nan)):
                    x = np.linspace(0, d[: curve.fitted()].max(), 200)
                    y = curve.fit["alpha"] * x - curve.fit["beta"] * bend(x, method)
                    ax.plot(x, y, "-", color=colour, linewidth=2)
            if any(curve.fitted() < len(curve.gold) for curve in shown):
                ax.set_ylim(bottom=2 * FLOOR)
                ax.set_xlim(right=1.15 * max(math.sqrt(max(0.0, *c.kl[: c.fitted() + 1])) for c in shown))
                ax.set_ylim(top=1.1 * max(max(c.proxy[: c.fitted() + 1]) for c in shown))
            ax.axhline(0, color="#888888", linewidth=1)
            ax.set_title(f"{method}: {'d(α - β d)' if method == 'best-of-n' else 'd(α - β log d)'}")
            ax.set_xlabel("d = √KL from the start (KL in nats per response)")
            ax.legend(frameon=False, fontsize=9)
        axes[0].set_ylabel("gain over the start, standard deviations\n(dots: gold, lines: its fit, dashed: proxy)")
    return figure


def overoptimise(
    task: str, options: dict[str, Any], settings: Settings, out: Path, say: Callable[[str], None] = lambda text: None
) -> list[Curve]:
    """Measure, write and draw; see the module's text for what lies in ``out`` then."""
    curves = measure(task, options, settings, say)
    out.mkdir(parents=True, exist_ok=True)
    found = {"task": task, "options": options, "settings": asdict(settings), "curves": [asdict(c) for c in curves]}
    write_json(out / "overoptimisation.json", found)
    (out / "overoptimisation.png").write_bytes(as_png(draw(curves)))
    return curves
