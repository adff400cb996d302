"""Peers that take turns: the protocol with a process that stands in for a trainer, and TRL itself where it is."""

import csv
import sys

import pytest
import torch

from lm_envs.benchmarks.speed import throughput as bench
from lm_envs.benchmarks.speed import throughput_peers
from lm_envs.benchmarks.speed.throughput_peers import PEERS, RIVALS, Peer, installed
from lm_envs.benchmarks.speed.throughput_work import WAYS, Size

STANDS_IN = """
import json, sys, time
job = json.loads(sys.argv[1])
if job["trainer"] == "rloo":
    print("no such trainer here", file=sys.stderr)
    sys.exit(1)
print("what a trainer prints " * 10_000, file=sys.stderr)  # more than a pipe holds
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "peak":
        print(json.dumps(job["rows"] * job["new_tokens"] * job["vocabulary"]), flush=True)
        continue
    start, used = time.perf_counter(), time.process_time()
    while time.process_time() - used < 0.02 * job["epochs"]:
        pass
    print(time.perf_counter() - start, flush=True)
"""


@pytest.fixture
def stands_in(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(STANDS_IN)
    monkeypatch.setattr(throughput_peers, "_python", lambda where: throughput_peers.Path(sys.executable))
    monkeypatch.setattr(throughput_peers, "WORKER", worker)


SIZE = Size("small", rows=2, prompt_length=2, new_tokens=3)


def test_a_peer_answers_and_ends(stands_in):
    peer = Peer("trl-1.12 ppo 4 epochs", SIZE, "cpu", 1)
    assert bench.timed(peer, "cpu") >= 0.08
    assert peer.ask("peak") == 2 * 3 * 1000
    if bench.Load()._stat.exists():
        assert peer.cpu_seconds >= 0.07  # its time is not foreign load
    peer.close()
    assert peer._process.poll() == 0


def test_a_peer_that_fails_says_why(stands_in):
    with pytest.raises(RuntimeError, match="rloo' ended by itself: no such trainer here"):
        Peer("trl-1.16 rloo", SIZE, "cpu", 1)


def test_rivals_are_ways_and_ratios_are_within_a_round(stands_in, monkeypatch):
    assert set(RIVALS) <= set(WAYS) and set(RIVALS.values()) == set(PEERS)
    seconds = iter([9.0, 9.0, 2.0, 6.0, 12.0, 3.0])  # first calls; ours, theirs; then the other way round
    monkeypatch.setattr(bench, "timed", lambda call, device: next(seconds))
    monkeypatch.setattr(bench.Load, "foreign", lambda self: 0.0)
    names = ["grpo", "trl-1.16 grpo"]
    small = Size("small", rows=4, prompt_length=2, new_tokens=2)
    found = bench.measure(small, names, bench.Settings(rounds=2, threads=torch.get_num_threads()))
    assert found["grpo"]["of_peer"] == (3 + 4) / 2 and found["trl-1.16 grpo"]["of_peer"] is None
    assert found["grpo"]["of_generate"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_shape")
def test_what_is_not_measured_anew_stays(stands_in, tmp_path):
    out = tmp_path / "t.csv"

    def measured(*ways, **more):
        chosen = dict(shapes=("small",), tables=("fixed work",), rounds=1, threads=1, peaks=False)
        bench.run(bench.Settings(ways=ways, out=out, **{**chosen, **more}))
        return [row["way"] for row in csv.DictReader(out.open())]

    assert measured("bare forward") == ["generate", "bare forward"]
    text = out.read_text()
    out.write_text(text.replace(",,0.", ",12.5,0."))  # as if memory had been measured
    assert measured("our forwards", add=True) == ["bare forward", "generate", "our forwards"]
    kept = {row["way"]: row["peak_MB"] for row in csv.DictReader(out.open())}
    assert kept == {"bare forward": "12.5", "generate": "12.5", "our forwards": ""}
    assert measured("bare forward") == ["generate", "bare forward"]


def test_peers_that_are_not_there_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(throughput_peers, "HOME", tmp_path)
    assert installed() == ()
    with pytest.raises(ValueError, match="trl-1.16 grpo: not installed here; `make peers`"):
        bench.check(bench.Settings(ways=("trl-1.16 grpo",)))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_shape")
@pytest.mark.parametrize("way", PEERS)
def test_trl_does_the_work(way):
    if way not in installed():
        pytest.skip("`make peers` installs it")
    peer = Peer(way, Size("small", rows=4, prompt_length=3, new_tokens=5), "cpu", 1)
    assert peer.ask("go") > 0 and peer.ask("peak") > 0
    peer.close()
    assert peer._process.poll() == 0
