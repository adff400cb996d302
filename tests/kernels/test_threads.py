"""Sharing blocks between threads: every item once, errors heard, torch's settings left as they were; few threads."""

from __future__ import annotations

import threading

import pytest
import torch

from lm_envs.kernels.threads import at_most, share


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_every_item_once(threads):
    seen, workers, settings = [], set(), set()
    started = threading.Barrier(threads)

    def work(items):
        started.wait(10)  # all of them at once, or this breaks
        workers.add(threading.get_ident())
        settings.add((torch.get_num_threads(), torch.is_grad_enabled()))
        seen.extend(items)

    share(range(100), 100, work)
    assert sorted(seen) == list(range(100)) and len(workers) == threads
    assert settings == {(1, False)} and torch.is_grad_enabled()
    fewer = []
    share(range(2), 1, lambda items: fewer.append(list(items)))
    assert fewer == [[0, 1]]


def test_an_error_is_raised_here(threads):
    def work(items):
        for item in items:
            if item == 7:
                raise RuntimeError("item 7")

    with pytest.raises(RuntimeError, match="item 7"):
        share(range(100), 100, work)


def test_few_threads_for_little_work(threads):
    with at_most(2):
        assert torch.get_num_threads() == min(2, threads)
        with at_most(5):  # never more than there were
            assert torch.get_num_threads() == min(2, threads)
    with pytest.raises(KeyError), at_most(0):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == threads
