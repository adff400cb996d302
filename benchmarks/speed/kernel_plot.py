"""The picture of a kernel benchmark: time of every variant, forward and backward, with its floor."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FORWARD, BACKWARD = "#3b6ea5", "#9dbfdd"


def draw(results: Path, image: Path) -> None:
    """One panel per size, a bar per variant, from the CSV of ``lm-envs bench kernels``."""
    with results.open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["ms"]]
    sizes: dict[tuple[str, ...], dict[str, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        size = tuple(row[key] for key in ("form", "dtype", "rows", "vocabulary", "width"))
        sizes.setdefault(size, {}).setdefault(row["variant"], {})[row["direction"]] = row
    columns = min(4, len(sizes))
    lines = -(-len(sizes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.1 * lines), squeeze=False)
    for axis, (size, found) in zip(axes.flat, sizes.items(), strict=False):
        _panel(axis, size, found)
    for axis in axes.flat[len(sizes) :]:
        axis.set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=7)
    first = rows[0]
    figure.suptitle(f"{first['machine']}, torch {first['torch']}, {first['date']}", fontsize=9)
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=110)
    plt.close(figure)


def _panel(axis: Any, size: tuple[str, ...], found: dict[str, dict[str, dict[str, Any]]]) -> None:
    form, dtype, rows, vocabulary, width = size
    names = list(reversed(found))
    forward = [float(found[name]["forward"]["ms"]) for name in names]
    backward = [float(found[name]["backward"]["ms"]) for name in names]
    axis.barh(names, forward, color=FORWARD, label="forward")
    axis.barh(names, backward, left=forward, color=BACKWARD, label="backward")
    floor = float(found[names[0]]["total"]["floor_ms"])
    axis.axvline(floor, color="black", linewidth=1, linestyle=":", label="floor of both")
    inputs = f", from hidden states of {width}" if width != "0" else ""
    axis.set_title(f"{form}, {dtype}, {rows} x {vocabulary}{inputs}", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("ms", fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
