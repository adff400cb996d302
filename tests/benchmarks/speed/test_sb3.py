"""The Stable-Baselines3 benchmark: a small run from end to end, equal work on both sides, and what it refuses."""

from __future__ import annotations

import csv
import errno

import pytest
import torch

pytest.importorskip("stable_baselines3")
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.speed import sb3
from lm_envs.benchmarks.speed.throughput_work import Size, Work

pytestmark = pytest.mark.usefixtures("tiny_shape")


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    out, words = tmp_path / "t.csv", ["--shapes", "small", "--rows", "4", "--new-tokens", "6", "--rounds", "2"]
    main(["bench", "sb3", *words, "--out", str(out)])
    rows = {row["way"]: row for row in csv.DictReader(out.open())}
    assert list(rows) == ["our ppo", "sb3 ppo", "sb3 ppo, 4 minibatches"] and float(rows["our ppo"]["times_ours"]) == 1
    for row in rows.values():
        assert float(row["tokens_per_s"]) == pytest.approx(24 / float(row["seconds"]), rel=0.05)
        assert row["date"] and row["torch"] and row["stable-baselines3"]
    assert "x ours" in capsys.readouterr().out


def test_a_full_disk_leaves_the_results_that_were_there(tmp_path, monkeypatch):
    out, line = tmp_path / "t.csv", {"shape": "small", "way": "a", "seconds": 1.0, "times_ours": 1.0}
    monkeypatch.setattr(sb3, "lines", lambda settings: iter([[line]]))
    sb3.run(sb3.Settings(out=out))
    old = out.read_text()

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(sb3, "lines", lambda settings: iter([[line | {"seconds": 2.0}]]))
    with pytest.raises(OSError, match="No space left"):
        sb3.run(sb3.Settings(out=out))
    assert out.read_text() == old


def test_both_sides_read_each_text_once_an_epoch(monkeypatch):
    work, read, original = Work(Size("small", rows=4, prompt_length=3, new_tokens=5)), [], LMPolicy.__init__

    def watched(self, *given, **more):
        original(self, *given, **more)
        self.model.register_forward_pre_hook(
            lambda _, __, named: read.append(len(named["input_ids"])) if torch.is_grad_enabled() else None,
            with_kwargs=True,
        )

    monkeypatch.setattr(LMPolicy, "__init__", watched)
    for run in (work.train(sb3.OurPPO, sb3.PPOConfig, epochs=2), sb3.sb3(work, 2, 1)):
        read.clear()
        run()
        assert read == [4, 4]
    read.clear()
    sb3.sb3(work, 2, 4)()
    assert len(read) == 8 and sum(read) > 8  # minibatches repeat


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shapes": ("huge",)}, "shapes.0. must be .small."),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rows": 5, "new_tokens": 5}, "5 x 5 tokens do not divide into 4 minibatches"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        sb3.run(sb3.Settings(**given))
