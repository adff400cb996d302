"""What the vocabulary kernels cost, against plain torch, torch.compile and other libraries, and against a roofline.

    lm-envs bench kernels                  the grid of the device that is there, into benchmarks/results/
    python benchmarks/speed/kernels.py     the same where only torch and triton are installed

Each line of the CSV is one variant in one direction on one size, with its floor: the time in which the bytes that must
move would move at the copy bandwidth measured in the same run (for logits), or the products that must be computed would
be computed at the rate measured in the same run (from hidden states). On a CPU every measurement is a process of its
own, variants taking turns, so that no variant finds memory that another has warmed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
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
RESULTS = Path("benchmarks") / "results"
# Logits read and written, in logits tensors: the policy's once forward; again, and its gradient, backward.
LOGITS_MOVED = {("single", "forward"): 1, ("single", "backward"): 2, ("dual", "forward"): 2, ("dual", "backward"): 3}
# Products of N*V*H multiply-adds with no logit made twice: one a head, and one each for the two gradients.
PRODUCTS = {("single", "forward"): 1, ("single", "total"): 3, ("dual", "forward"): 2, ("dual", "total"): 4}


@dataclass(frozen=True)
class Size:
    """What is measured: ``form`` single (log-probability and entropy) or dual (and the reference's, and the KL)."""

    form: str
    dtype: str
    rows: int
    vocabulary: int
    width: int = 0  # of the hidden states; 0 for the form that takes logits
    threads: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of one logits tensor."""
        return self.rows * self.vocabulary * (2 if self.dtype == "bfloat16" else 4)

    def floor(self, direction: str, bandwidth: float, rate: float) -> float:
        """Seconds below which this cannot be done.

        Args:
            direction: forward, backward, or total of both.
            bandwidth: bytes a second; rate: operations a second.
        """
        if self.width == 0:
            moved = LOGITS_MOVED[self.form, "forward"] * (direction != "backward")
            moved += LOGITS_MOVED[self.form, "backward"] * (direction != "forward")
            return moved * self.bytes / bandwidth
        products = PRODUCTS[self.form, "forward" if direction == "forward" else "total"]
        if direction == "backward":
            products -= PRODUCTS[self.form, "forward"]
        return products * 2 * self.rows * self.vocabulary * self.width / rate


def grid(device: str, arguments: argparse.Namespace) -> Iterator[Size]:
    """The sizes of a run."""
    rows = arguments.rows or (8192 if device == "cuda" else 2048)
    vocabularies = arguments.vocabularies or ([50257, 128256, 151936] if device == "cuda" else [50257, 128256])
    dtypes = arguments.dtypes or (["bfloat16", "float32"] if device == "cuda" else ["float32", "bfloat16"])
    threads = 0 if device == "cuda" else arguments.threads
    for vocabulary in vocabularies:
        for dtype in dtypes:
            for form in [form for form in arguments.forms if form != "linear"]:
                # plain torch needs about ten tensors of this size: fewer rows where they are larger
                count = rows if device == "cuda" else max(1, rows * 50257 // max(vocabulary, 50257))
                yield Size(form, dtype, count, vocabulary, threads=threads)
    width = arguments.width or (4096 if device == "cuda" else 512)
    for form in ("single", "dual") if "linear" in arguments.forms else ():
        dtype = dtypes[0]
        yield Size(form, dtype, rows if device == "cuda" else max(1, rows // 2), vocabularies[0], width, threads)


def measure_cuda(size: Size, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Medians by triton's ``do_bench``, which clears the cache between calls; memory by torch's allocator."""
    from triton.testing import do_bench

    torch.cuda.empty_cache()
    data = variants.inputs(size, "cuda")
    torch._functorch.config.donated_buffer = False  # backward is called again
    for name, call in variants.available(size, "cuda", names):
        try:
            forward = 1e-3 * do_bench(lambda call=call: call(data), return_mode="median")
            value = call(data)
            leaves = variants.leaves(data)

            def backward(value: Any = value, leaves: Any = leaves) -> Any:
                return torch.autograd.grad(value[0], leaves, value[1], retain_graph=True, allow_unused=True)

            behind = 1e-3 * do_bench(backward, return_mode="median")
            del value, backward
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
    """What a call gives for each name, once a round; every second round goes the other way."""
    found: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in list(found)[:: -1 if turn % 2 else 1]:
            found[name].append(call(name))
    return found


def ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


def child(words: Sequence[str], job: dict[str, Any], threads: int, **more: Any) -> Any:
    """What a Python process, told a job, prints last, as JSON.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **more.pop("env", {})}
    command = [sys.executable, *words, json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **more)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure_cpu(size: Size, names: Sequence[str] | None, rounds: int) -> Iterator[dict[str, Any]]:
    """Each variant in a process of its own, in turns; medians over the rounds."""

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
    """Copy bandwidth (bytes a second, read and written) and matrix-product rate (operations a second), measured now."""
    if device == "cpu":
        found = _child(replace(size, rows=min(size.rows, 1024)), "rates")
        return found["bandwidth"], found["rate"]
    from triton.testing import do_bench

    def timed(function: Callable[[], Any]) -> float:
        return 1e-3 * do_bench(function, return_mode="median")

    return _rates(size, "cuda", timed)


def _rates(size: Size, device: str, timed: Callable[[Callable[[], Any]], float]) -> tuple[float, float]:
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

        def timed(function: Callable[[], Any]) -> float:
            function()
            return statistics.median(_seconds(function) for _ in range(5))

        bandwidth, rate = _rates(size, "cpu", timed)
        return {"bandwidth": bandwidth, "rate": rate}
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
        end = time.perf_counter()
        times.append((middle - start, end - middle))
        del value, upstream, gradients
    times.sort(key=sum)
    return {"forward": times[1][0], "backward": times[1][1], "peak": peak}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _peak(function: Callable[[], Any]) -> int:
    """Resident bytes above what was there just before, at the most; -1 where the system does not say."""
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
    """What the numbers depend on."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        name = f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    found = {"date": datetime.date.today().isoformat(), "machine": name, "python": platform.python_version()}
    return found | {"torch": torch.__version__} | variants.versions()


def measure(size: Size, device: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Lines of one size."""
    bandwidth, rate = rates(device, replace(size, form=""))
    names, rounds = arguments.variants, arguments.rounds
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


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="lm-envs bench kernels", description=(__doc__ or "").splitlines()[0])
    found.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--rows", type=int, help="tokens; 8192 on CUDA, 2048 on a CPU")
    found.add_argument("--vocabularies", type=int, nargs="+", metavar="V")
    found.add_argument("--width", type=int, help="of the hidden states, for the linear form")
    found.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    found.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="linear: both, from hidden states")
    found.add_argument("--variants", nargs="+", metavar="NAME", help=f"of {', '.join(variants.NAMES)}")
    found.add_argument("--rounds", type=int, default=5, help="on a CPU: processes per variant")
    found.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="on a CPU")
    found.add_argument("--out", type=Path, help=f"CSV file; kernels-DEVICE.csv in {RESULTS} if not given")
    found.add_argument("--plot", type=Path, help="also draw it, into this file (needs matplotlib)")
    found.add_argument("--child", help=argparse.SUPPRESS)
    return found


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the CSV after every size.

    Raises:
        ValueError: a device or a variant that is not there.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    unknown = set(arguments.variants or ()) - set(variants.NAMES)
    if unknown:
        raise ValueError(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(variants.NAMES)}")
    out = arguments.out or RESULTS / f"kernels-{arguments.device}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    about, lines = machine(arguments.device), []
    for size in grid(arguments.device, arguments):
        for line in measure(size, arguments.device, arguments):
            lines.append(line | about)
            shown = [f"{line[key]}" for key in ("form", "dtype", "rows", "vocabulary", "width", "variant", "direction")]
            print(*shown, f"{line['ms']} ms, floor {line['floor_ms']} ms, peak {line['peak_in_logits']}", line["error"])
            sys.stdout.flush()
        with out.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    print(out)
    if arguments.plot is not None:
        from lm_envs.benchmarks.speed.kernel_plot import draw

        draw(out, arguments.plot)
        print(arguments.plot)


def main(words: Sequence[str] | None = None) -> None:
    """The program."""
    arguments = parser().parse_args(words)
    if arguments.child:
        print(json.dumps(_be_child(json.loads(arguments.child))))
        return
    try:
        run(arguments)
    except ValueError as error:
        raise SystemExit(f"bench kernels: {error}") from None


if __name__ == "__main__":
    main()
