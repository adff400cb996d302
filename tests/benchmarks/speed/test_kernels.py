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
