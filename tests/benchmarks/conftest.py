"""Fixtures of the benchmarks' tests."""

import pytest
import torch

from lm_envs.benchmarks.speed import throughput_work
from lm_envs.benchmarks.speed.throughput_work import Shape


@pytest.fixture
def tiny_shape(monkeypatch):
    """The shape "small" is smaller still; torch's threads are as before afterwards."""
    monkeypatch.setitem(throughput_work.SHAPES, "small", Shape(1, 16, 2, 50))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
