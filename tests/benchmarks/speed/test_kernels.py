"""The kernel benchmark: floors by hand, a small run from end to end, and a run where only torch is installed."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.speed import kernels
from lm_envs.benchmarks.speed.kernels import Size
from tests.house import CHECKOUT

SMALL = ["--rows", "40", "--vocabularies", "3000", "--dtypes", "float32", "--rounds", "1", "--threads", "1"]


def test_floors_by_hand():
    """1000 bytes a second: L is 2 * 10 * 4 = 80 bytes, so one logits tensor takes 0.08 s."""
    dual, single = Size("dual", "float32", 2, 10), Size("single", "bfloat16", 2, 10)
    assert dual.floor("forward", 1000, 1) == pytest.approx(2 * 0.08)
    assert dual.floor("backward", 1000, 1) == pytest.approx(3 * 0.08)
    assert dual.floor("total", 1000, 1) == pytest.approx(5 * 0.08)
    assert single.floor("total", 1000, 1) == pytest.approx(3 * 0.04)
    linear = Size("dual", "float32", 2, 10, width=5)  # g = 2 * 2 * 10 * 5 = 200 operations
    assert [linear.floor(x, 1, 100) for x in ("forward", "backward", "total")] == pytest.approx([4, 4, 8])


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    out, image = tmp_path / "k.csv", tmp_path / "k.png"
    variants = ["native", "torch", "chunks", "loss"]
    words = ["--forms", "dual", "linear", "--width", "8", "--variants", *variants]
    main(["bench", "kernels", *SMALL, *words, "--out", str(out), "--plot", str(image)])
    rows = list(csv.DictReader(out.open()))
    assert [(row["form"], row["width"], row["variant"]) for row in rows[::3]] == [
        ("dual", "0", "native"),
        ("dual", "0", "torch"),
        ("single", "8", "chunks"),
        ("single", "8", "loss"),
        ("dual", "8", "chunks"),
        ("dual", "8", "loss"),
    ]
    assert all(float(row["ms"]) > 0 and float(row["floor_ms"]) > 0 and row["torch"] and row["date"] for row in rows)
    by = {row["direction"]: float(row["ms"]) for row in rows if (row["form"], row["variant"]) == ("dual", "native")}
    assert by["total"] == pytest.approx(by["forward"] + by["backward"], abs=2e-3)
    assert image.stat().st_size > 5000 and "native" in capsys.readouterr().out


@pytest.mark.slow
def test_it_runs_where_only_torch_is(tmp_path):
    """No gymnasium, matplotlib, tyro or transformers: the file as a script, from any folder."""
    missing = "gymnasium lm_envs matplotlib transformers tyro rich".split()
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name in {missing}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    script = CHECKOUT / "benchmarks" / "speed" / "kernels.py"
    words = ["--forms", "dual", "--variants", "chunked", "--out", str(tmp_path / "k.csv")]
    command = [sys.executable, str(script), *SMALL, *words]
    environment = {**kernels.os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader((tmp_path / "k.csv").open()))
    assert len(rows) == 3 and not any(row["error"] for row in rows)


def test_bad_requests():
    for words, message in ((["--variants", "magic"], "no variant magic"), (["--device", "cuda"], "sees no CUDA")):
        if words[-1] == "cuda" and kernels.torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as error:
            kernels.main(words)
        assert message in str(error.value)


def test_ratios_are_within_rounds_which_go_there_and_back():
    assert kernels.ratio([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == 2.0
    called = []
    found = kernels.in_turns("ab", 3, lambda name: called.append(name) or len(called))
    assert called == list("abbaab") and found == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_every_number_of_a_line_is_computed_a_second_time(monkeypatch):
    size = kernels.Size("dual", "bfloat16", 100, 1000, threads=1)
    monkeypatch.setattr(kernels, "rates", lambda device, size: (4e9, 2e12))
    measured = [{"variant": "x", "forward": 0.25, "backward": 0.5, "peak": 7e5}, {"variant": "y", "error": "no"}]
    monkeypatch.setattr(kernels, "measure_cpu", lambda size, names, rounds: measured)
    lines = list(kernels.measure(size, "cpu", (), 1))
    logits = 100 * 1000 * 2  # bytes
    moved = {"forward": 2, "backward": 3, "total": 5}  # both models' logits; again, and the gradient
    seconds = {"forward": 0.25, "backward": 0.5, "total": 0.75}
    for line, (name, times) in zip(lines[:3], moved.items(), strict=True):
        floor = times * logits / 4e9
        assert (line["direction"], line["ms"], line["floor_ms"]) == (name, 1e3 * seconds[name], round(1e3 * floor, 3))
        assert line["of_roofline"] == round(floor / seconds[name], 3) and line["peak_in_logits"] == 7e5 / logits
        assert (line["copy_GB_s"], line["product_TFLOP_s"], line["error"]) == (4.0, 2.0, "")
    assert [(line["variant"], line["ms"], line["error"]) for line in lines[3:]] == [("y", "", "no")] * 3
