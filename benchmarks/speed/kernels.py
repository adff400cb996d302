"""The cost of the vocabulary kernels beside plain torch, torch.compile, other libraries and a roofline.

    lm-envs bench kernels                  the grid of the device that is there, into benchmarks/results/
    python benchmarks/speed/kernels.py     the same where only torch and triton are installed

docs/kernels.md explains the CSV. On a CPU each measurement is a process of its own, variants taking turns, so that no
variant finds memory that another has warmed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are not top-level ones
try:
    import lm_envs  # noqa: F401
except ImportError:  # a machine with torch alone: the rooms are enough
    sys.modules["lm_envs"] = types.ModuleType("lm_envs")
    sys.modules["lm_envs"].__path__ = [str(ROOT)]

import torch  # noqa: E402

from lm_envs.benchmarks.speed import kernel_variants as variants  # noqa: E402

T = TypeVar("T")
FORMS = ("single", "dual", "linear")
SIZE = ("form", "dtype", "rows", "vocabulary", "width")
RESULTS = Path("benchmarks") / "results"
# Tensors of logits read and written: forward the policy's once; backward again, and its gradient.
LOGITS_MOVED = {"single": (1, 2), "dual": (2, 3)}
# Products of N*V*H multiply-adds if no logit is computed twice: one a head, and one for each of the two gradients.
PRODUCTS = {"single": (1, 2), "dual": (2, 2)}


@dataclass(frozen=True)
class Size:
    """One size: ``form`` single (log-probability and entropy) or dual (also the reference's, and the KL)."""

    form: str
    dtype: str
    rows: int
    vocabulary: int
    width: int = 0  # hidden states; 0 for the form that takes logits
    threads: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of one logits tensor."""
        return self.rows * self.vocabulary * (2 if self.dtype == "bfloat16" else 4)

    def floor(self, direction: str, bandwidth: float, rate: float) -> float:
        """Return the least possible seconds.

        Args:
            direction: "forward", "backward" or "total".
            bandwidth: bytes a second.
            rate: operations a second.
        """
        forward, backward = (PRODUCTS if self.width else LOGITS_MOVED)[self.form]
        times = {"forward": forward, "backward": backward, "total": forward + backward}[direction]
        if self.width == 0:
            return times * self.bytes / bandwidth
        return times * 2 * self.rows * self.vocabulary * self.width / rate


def grid(device: str, settings: Any) -> Iterator[Size]:
    """Yield the sizes of a run."""
    cuda = device == "cuda"
    rows, width = settings.rows or (8192 if cuda else 2048), settings.width or (4096 if cuda else 512)
    vocabularies = settings.vocabularies or ([50257, 128256, 151936] if cuda else [50257, 128256])
    dtypes = settings.dtypes or (["bfloat16", "float32"] if cuda else ["float32", "bfloat16"])
    forms, threads = settings.forms or FORMS, 0 if cuda else settings.threads or os.cpu_count() or 1
    for vocabulary, dtype in itertools.product(vocabularies, dtypes):
        for form in [form for form in forms if form != "linear"]:
            # plain torch needs about ten tensors of this size: fewer rows where they are larger
            count = rows if cuda else max(1, rows * 50257 // max(vocabulary, 50257))
            yield Size(form, dtype, count, vocabulary, threads=threads)
    for form in ("single", "dual") if "linear" in forms else ():
        yield Size(form, dtypes[0], rows if cuda else max(1, rows // 2), vocabularies[0], width, threads)


def measure_cuda(size: Size, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure medians by Triton's ``do_bench``, which clears the cache between calls; memory by torch's allocator."""
    from torch._functorch import config
    from triton.testing import do_bench

    torch.cuda.empty_cache()
    data = variants.inputs(size, "cuda")
    config.donated_buffer = False  # backward is called again
    for name, call in variants.available(size, "cuda", names):
        try:
            forward = 1e-3 * do_bench(lambda call=call: call(data), return_mode="median")
            outputs, upstream = call(data)
            backward = functools.partial(torch.autograd.grad, outputs, variants.leaves(data), upstream)
            behind = 1e-3 * do_bench(lambda go=backward: go(retain_graph=True, allow_unused=True), return_mode="median")
            del outputs, upstream, backward
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            variants.once(call, data)
            peak = torch.cuda.max_memory_allocated() - before
        except torch.cuda.OutOfMemoryError:
            yield {"variant": name, "error": "out of memory"}
            continue
        yield {"variant": name, "forward": forward, "backward": behind, "peak": peak}


def in_turns(names: Iterable[str], rounds: int, call: Callable[[str], T]) -> dict[str, list[T]]:
    """Return the results of a call for each name, once a round; every second round goes the other way."""
    found: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in list(found)[:: -1 if turn % 2 else 1]:
            found[name].append(call(name))
    return found


def ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


def child(words: Sequence[str], job: dict[str, Any], threads: int, **more: Any) -> Any:
    """Run a Python process with a job as its last argument; return the JSON that it prints last.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **more.pop("env", {})}
    command = [sys.executable, *words, json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **more)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure_cpu(size: Size, names: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Measure each variant in a process of its own, in turns; medians over the rounds."""

    def one(name: str) -> dict[str, Any]:
        try:
            return _child(size, name)
        except RuntimeError as error:
            return {"error": str(error)}

    for name, several in in_turns([n for n, _ in variants.available(size, "cpu", names)], rounds, one).items():
        failed = next((found for found in several if "error" in found), None)
        keys = ("forward", "backward", "peak")
        yield {"variant": name} | (failed or {key: statistics.median(found[key] for found in several) for key in keys})


@functools.cache
def rates(device: str, size: Size) -> tuple[float, float]:
    """Measure copy bandwidth (bytes a second, read and written) and matrix-product rate (operations a second)."""
    if device == "cpu":
        return tuple(_child(replace(size, rows=min(size.rows, 1024)), "rates")["rates"])
    return _rates(size, "cuda")


def _rates(size: Size, device: str) -> tuple[float, float]:
    def timed(function: Callable[[], Any]) -> float:
        if device == "cuda":
            from triton.testing import do_bench

            return 1e-3 * do_bench(function, return_mode="median")
        function()
        return statistics.median(_seconds(function) for _ in range(5))

    dtype = getattr(torch, size.dtype)
    a = torch.zeros(max(size.bytes, 2**28) // 4, device=device)
    b = torch.empty_like(a)
    bandwidth = 2 * a.numel() * 4 / timed(lambda: b.copy_(a))
    width = size.width or 512
    rows = min(size.rows, 2**27 // size.vocabulary) if device == "cuda" else min(size.rows, 256)
    h, w = (torch.randn(n, width, device=device).to(dtype) for n in (rows, size.vocabulary))
    out = torch.empty(rows, size.vocabulary, dtype=dtype, device=device)
    return bandwidth, 2 * rows * size.vocabulary * width / timed(lambda: torch.mm(h, w.t(), out=out))


def _child(size: Size, variant: str) -> dict[str, Any]:
    script = str(Path(__file__).resolve())
    return child([script, "--child"], {"size": asdict(size), "variant": variant}, size.threads)


def _be_child(job: dict[str, Any]) -> dict[str, Any]:
    size = Size(**job["size"])
    torch.set_num_threads(size.threads)
    if job["variant"] == "rates":
        return {"rates": _rates(size, "cpu")}
    data = variants.inputs(size, "cpu")
    [(_, call)] = variants.available(size, "cpu", [job["variant"]])
    variants.once(call, data)  # compiles, and makes the machine hand out the memory once
    peak = _peak(lambda: variants.once(call, data))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        value, upstream = call(data)
        middle = time.perf_counter()
        gradients = torch.autograd.grad(value, variants.leaves(data), upstream, allow_unused=True)
        times.append((middle - start, time.perf_counter() - middle))
        del value, upstream, gradients
    forward, backward = sorted(times, key=sum)[1]
    return {"forward": forward, "backward": backward, "peak": peak}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _peak(function: Callable[[], Any]) -> int:
    """The most resident bytes beyond those of just before; -1 where the system does not say."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return -1

    def read(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) * 1024

    before = read("VmRSS")
    function()
    return read("VmHWM") - before


def machine(device: str) -> dict[str, Any]:
    """Return what the numbers depend on: date, machine and versions."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        name = f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    found = {"date": datetime.date.today().isoformat(), "machine": name, "python": platform.python_version()}
    return found | {"torch": torch.__version__} | variants.versions()


def measure(size: Size, device: str, names: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of one size."""
    bandwidth, rate = rates(device, replace(size, form=""))
    for one in measure_cuda(size, names) if device == "cuda" else measure_cpu(size, names, rounds):
        for direction in ("forward", "backward", "total"):
            line = {**asdict(size), "variant": one["variant"], "direction": direction, "ms": "", "floor_ms": ""}
            line |= {"of_roofline": "", "peak_in_logits": "", "error": one.get("error", "")}
            line |= {"copy_GB_s": round(bandwidth / 1e9, 1), "product_TFLOP_s": round(rate / 1e12, 3)}
            if "error" not in one:
                seconds = one["forward"] + one["backward"] if direction == "total" else one[direction]
                floor = size.floor(direction, bandwidth, rate)
                line |= {"ms": round(1e3 * seconds, 3), "floor_ms": round(1e3 * floor, 3)}
                line |= {"of_roofline": round(floor / seconds, 3), "peak_in_logits": round(one["peak"] / size.bytes, 3)}
            yield line


def run(settings: Any) -> None:
    """Measure, print, and write the CSV after every size.

    Args:
        settings: a :class:`~lm_envs.benchmarks.speed.settings.Kernels`, or the options of :func:`main`.

    Raises:
        ValueError: a device or a variant that is not there.
    """
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    names = settings.variants or ()
    if unknown := sorted(set(names) - set(variants.VARIANTS)):
        raise ValueError(f"no variant {', '.join(unknown)}; there are {', '.join(variants.VARIANTS)}")
    out = settings.out or RESULTS / f"kernels-{device}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    about, lines = machine(device), []
    for size in grid(device, settings):
        for line in measure(size, device, names, settings.rounds):
            lines.append(line | about)
            shown = [f"{line[key]}" for key in (*SIZE, "variant", "direction")]
            print(*shown, f"{line['ms']} ms, floor {line['floor_ms']} ms, peak {line['peak_in_logits']}", line["error"])
            sys.stdout.flush()
        with out.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    print(out)
    if settings.plot is not None:
        draw([line for line in lines if line["ms"] != ""], settings.plot)
        print(settings.plot)


def draw(lines: Sequence[dict[str, Any]], image: Path) -> None:
    """Draw a panel per size with a bar per variant, forward and backward, and the floor of both."""
    from matplotlib.figure import Figure

    panels: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}  # by size and variant
    for line in lines:
        found = panels.setdefault(tuple(line[key] for key in SIZE), {}).setdefault(line["variant"], {})
        found |= {line["direction"]: line["ms"], "floor": line["floor_ms"]}  # the last direction is the total
    columns = min(4, len(panels))
    count = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.1 * count), layout="tight")
    axes = figure.subplots(count, columns, squeeze=False).flat
    for axis, ((form, dtype, rows, vocabulary, width), panel) in zip(axes, panels.items(), strict=False):
        names = list(reversed(panel))
        forward, backward = ([panel[name][key] for name in names] for key in ("forward", "backward"))
        axis.barh(names, forward, color="#3b6ea5", label="forward")
        axis.barh(names, backward, left=forward, color="#9dbfdd", label="backward")
        axis.axvline(panel[names[0]]["floor"], color="black", linewidth=1, linestyle=":", label="floor of both")
        given = f", from hidden states of {width}" if width else ""
        axis.set_title(f"{form}, {dtype}, {rows} x {vocabulary}{given}", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ms", fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].legend(frameon=False, fontsize=7)
    figure.suptitle(f"{lines[0]['machine']}, torch {lines[0]['torch']}, {lines[0]['date']}", fontsize=9)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=110)


def main(words: Sequence[str] | None = None) -> None:
    """The program where lm-envs is not installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    for name in ("rows", "width", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--vocabularies", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="linear: both, from hidden states")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"of {', '.join(variants.VARIANTS)}")
    parser.add_argument("--rounds", type=int, default=5, help="on a CPU: processes per variant")
    parser.add_argument("--out", type=Path, metavar="FILE.csv")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="needs matplotlib")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.child:
        print(json.dumps(_be_child(json.loads(arguments.child))))
        return
    try:
        run(arguments)
    except ValueError as error:
        raise SystemExit(f"bench kernels: {error}") from None


if __name__ == "__main__":
    main()
