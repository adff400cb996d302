"""TensorBoard shows every iteration once, whatever was killed and resumed."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lm_envs.benchmarks.run.tracking import Tracker


def log(folder, iterations, value, resumed_at=0):
    tracker = Tracker(folder, resumed_at)
    for iteration in iterations:
        tracker.scalars({"kl": value}, iteration)
    tracker.close()


@pytest.mark.parametrize("resumed_at", [0, 2])
def test_a_resumed_run_shows_no_step_twice(tmp_path, resumed_at):
    log(tmp_path, range(5), 1.0)
    first = 0 if resumed_at == 0 else resumed_at + 1
    log(tmp_path, range(first, 5), 2.0, resumed_at)
    log(tmp_path, range(first, 7), 3.0, resumed_at)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    found = [(event.step, event.value) for event in read.Scalars("main/kl")]
    assert found == [(step, 1.0 if step < first else 3.0) for step in range(7)]
