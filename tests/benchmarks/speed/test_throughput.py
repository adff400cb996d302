"""The throughput benchmark: a small run from end to end, what its numbers mean, and what it refuses."""

from __future__ import annotations

import csv
import time
from types import SimpleNamespace

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.speed import throughput as bench
from lm_envs.benchmarks.speed import throughput_work
from lm_envs.benchmarks.speed.throughput_work import Size, Work

pytestmark = pytest.mark.usefixtures("tiny_shape")


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    out = tmp_path / "t.csv"
    ways = ["step", "bulk + reference + reward", "bare forwards", "bare forward", "ppo 1 epoch"]
    words = [
        "--shapes",
        "small",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--tables",
        "fixed work",
        "--no-peaks",
        "--ways",
        *ways,
    ]
    main(["bench", "throughput", *words, "--out", str(out)])
    rows = {row["way"]: row for row in csv.DictReader(out.open())}
    assert list(rows) == ["generate", *ways]
    assert float(rows["generate"]["of_generate"]) == 1
    for row in rows.values():
        seconds = float(row["seconds"])
        assert float(row["first_s"]) > 0
        assert float(row["tokens_per_s"]) == pytest.approx(32 * 48 / seconds, rel=0.02) and row["torch"] and row["date"]
    floor = float(rows["bare forwards"]["seconds"]) + 2 * float(rows["bare forward"]["seconds"])
    bulk = rows["bulk + reference + reward"]
    assert float(bulk["times_floor"]) == pytest.approx(float(bulk["seconds"]) / floor, rel=0.02)
    assert rows["ppo 1 epoch"]["times_floor"] == ""  # its floor was not measured
    assert "x generate" in capsys.readouterr().out


def test_what_is_measured_again_takes_the_place_of_its_line(tmp_path, monkeypatch):
    """With add the other lines stay, and without peaks the known memory does, which load does not change."""
    same = {"table": "rows", "shape": "small", "vocabulary": 50, "prompt": 16, "new_tokens": 48, "of_generate": 1.0}
    same |= {"of_peer": "", "times_floor": "", "first_s": 0.1, "foreign_load": 0.0}
    out = tmp_path / "t.csv"

    def measured(seconds, peak, rows, ways):
        lines = [{**same, "rows": rows, "way": way, "seconds": seconds, "peak_MB": peak} for way in ways]
        monkeypatch.setattr(bench, "lines", lambda settings: iter([lines]))
        bench.run(bench.Settings(shapes=("small",), peaks=peak != "", add=True, out=out, threads=1))
        return sorted((r["way"], r["rows"], r["seconds"], r["peak_MB"]) for r in csv.DictReader(out.open()))

    measured(1.0, 5.0, 1, ["generate", "step"])
    found = measured(2.0, "", 1, ["step"])
    assert found == [("generate", "1", "1.0", "5.0"), ("step", "1", "2.0", "5.0")]
    assert len(measured(3.0, 6.0, 4, ["step"])) == 3


def without_compiling(names):
    """As they are, but for those that take a compiler, in the slow tests."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in throughput_work.COMPILED else n for n in names]


def test_without_a_compiler_the_other_ways_are_measured(capsys):
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        (_, _, ways), *_ = bench.sizes(bench.Settings(shapes=("small",), tables=("fixed work",)))
    assert set(ways) & set(throughput_work.WAYS) == set(throughput_work.WAYS) - set(throughput_work.COMPILED)
    said = capsys.readouterr().out
    assert "without the compiled ways" in said and "g++" in said


@pytest.mark.parametrize("way", without_compiling(throughput_work.WAYS))
def test_every_way_does_the_work(way):
    if way in throughput_work.COMPILED and not bench._compiles("cpu"):
        pytest.skip("no C++ compiler")
    work = Work(Size("small", rows=4, prompt_length=3, new_tokens=5))
    call = work.way(way)
    call()
    call()


def test_the_tables():
    found = list(bench.sizes(bench.Settings(shapes=("small",))))
    by = {table: [size for name, size, _ in found if name == table] for table, _, _ in found}
    assert [size.new_tokens for size in by["response length"]] == [32, 64, 128, 256, 512]
    assert [size.rows for size in by["rows"]] == [1, 4, 16, 64, 256]
    assert [size.model.vocabulary for size in by["vocabulary"]] == [1_000, 8_192, 32_768, 131_072]
    assert by["fixed work"] == [Size("small", 32, 16, 48)]


def test_own_work_is_not_foreign_load(monkeypatch):
    load = bench.Load()
    monkeypatch.setattr(load, "_start", (100.0, 10.0, 1000.0))
    monkeypatch.setattr(load, "_now", lambda: (104.0, 13.0, 1002.0))  # 4 s busy in 2 s, 3 of them ours
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    assert load.foreign() == pytest.approx((1 / 4) if load._stat.exists() else 0)


def test_a_disturbed_round_is_measured_again(monkeypatch):
    shares = iter([0.5, 0.0, 0.5, 0.5, 0.5])
    seconds = iter([20.0, 9.0, 1.0, 7.0, 6.0, 5.0])

    class Disturbed(bench.Load):
        def foreign(self):
            return next(shares)

    monkeypatch.setattr(bench, "Load", Disturbed)
    monkeypatch.setattr(bench, "timed", lambda call, device: next(seconds))
    monkeypatch.setattr(bench, "Work", lambda size, device: Work(Size("small", rows=2, prompt_length=2, new_tokens=2)))
    found = bench.measure(Size("small"), ["bare forward"], bench.Settings(rounds=2, threads=1))["bare forward"]
    assert found["seconds"] == 3.5 and found["foreign"] == 0.5  # median of 1 and 6; the last retry counts and is marked
    assert found["first"] == 20


def test_seconds_are_seconds():
    assert 0.02 < bench.timed(lambda: time.sleep(0.02), "cpu") < 1


@pytest.mark.slow
def test_memory_is_that_of_the_call():
    """A process of its own, whose mark is above what the logits of one forward take."""
    size = Size("small", rows=8, vocabulary=4096)
    logits = 8 * 48 * 4096 * 4
    assert logits < bench.peak(size, "bare forward+backward", bench.Settings(threads=1)) < 40 * logits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(ways=("magic",)), "no way magic"),
        (dict(shapes=("huge",)), "shapes.0. must be .small."),
        (dict(rounds=0), "rounds"),
    ],
)
def test_bad_requests(given, message):
    with pytest.raises(ValueError, match=message):
        bench.check(bench.Settings(**given))


def test_every_number_of_a_line_is_computed_a_second_time(monkeypatch):
    """Of three rounds: the median of the seconds, and of the ratios to generate and to the other library's way."""
    rival = "trl-1.12 ppo 4 epochs"
    times = {"generate": [4.0, 2.0, 6.0], "bare forwards": [0.5, 1.0, 0.75], "bare forward+backward": [1.0, 2.0, 1.5]}
    times |= {"ppo 4 epochs": [8.0, 16.0, 4.0], rival: [24.0, 8.0, 6.0]}
    known = {
        name: {"times": own, "seconds": sorted(own)[1], "first": 9.0 + own[0], "foreign": 0.03}
        for name, own in times.items()
    }
    nothing = SimpleNamespace(way=lambda name: None, close=lambda: None)
    monkeypatch.setattr(bench, "Work", lambda size, device: nothing)
    monkeypatch.setattr(bench, "Peer", lambda *given: nothing)
    monkeypatch.setattr(bench, "in_rounds", lambda ways, rounds, device: {name: dict(known[name]) for name in ways})
    monkeypatch.setattr(bench, "peak", lambda size, name, settings: 1_000_000 * len(name))
    settings = bench.Settings(
        shapes=("small",), ways=tuple(times), tables=("fixed work",), rounds=3, peaks=True, threads=1
    )
    (batch,) = bench.lines(settings)
    size = Size("small")
    for line, (name, own) in zip(batch, times.items(), strict=True):
        of_generate = sorted(a / b for a, b in zip(times["generate"], own, strict=True))[1]
        assert (line["way"], line["seconds"], line["of_generate"]) == (name, sorted(own)[1], round(of_generate, 3))
        assert line["tokens_per_s"] == round(size.rows * size.new_tokens / sorted(own)[1], 1)
        assert (line["first_s"], line["foreign_load"], line["peak_MB"]) == (9.0 + own[0], 0.03, len(name))
        assert (line["rows"], line["new_tokens"], line["prompt"], line["rounds"]) == (32, 48, 16, 3)
        assert line["of_peer"] == (1.5 if name == "ppo 4 epochs" else "")  # of 3, 0.5 and 1.5
        assert line["times_floor"] == (round(8.0 / (0.75 + 4 * 1.5), 3) if name == "ppo 4 epochs" else "")


def test_others_have_the_part_of_the_machine_that_is_not_ours(monkeypatch):
    load = bench.Load()
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 4)
    load._start = (10.0, 3.0, 100.0)
    monkeypatch.setattr(load, "_now", lambda: (18.0, 5.0, 105.0))
    assert load.foreign() == pytest.approx((8 - 2) / (5 * 4))  # seconds of others of those of all cores


def test_every_second_round_goes_back_and_the_first_call_is_its_own(monkeypatch):
    called, shares = [], iter([0.0, 1.0, 0.01, 0.0])  # the second round is disturbed, and made again
    monkeypatch.setattr(bench, "timed", lambda call, device: call())
    monkeypatch.setattr(bench, "Load", lambda peers: SimpleNamespace(foreign=lambda: next(shares)))
    ways = {name: (lambda name=name: called.append(name) or float(len(called))) for name in "ab"}
    found = bench.in_rounds(ways, 3)
    assert called == list("ababbabaab")
    assert found["a"] == {"times": [3.0, 8.0, 9.0], "seconds": 8.0, "first": 1.0, "foreign": 0.01}
    assert found["b"] == {"times": [4.0, 7.0, 10.0], "seconds": 7.0, "first": 2.0, "foreign": 0.01}
