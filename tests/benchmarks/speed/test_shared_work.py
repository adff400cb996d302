"""What tensors hold at the most, by hand."""

import torch

from lm_envs.benchmarks.speed.shared_work import LiveMemory


def test_the_most_that_tensors_held_at_one_time():
    before = torch.zeros(10_000)
    memory = LiveMemory()
    memory.start()
    first = torch.zeros(1_000)
    second = torch.zeros(3_000)
    del first, before  # the one's 4,000 bytes make room for others, the other's were never counted
    third = torch.zeros(2_000)
    del second, third
    torch.zeros(500)
    assert memory.stop() == 4 * (3_000 + 2_000)


def test_it_starts_anew():
    memory = LiveMemory()
    for count in (2_000, 100):
        memory.start()
        torch.zeros(count)
        assert memory.stop() == 4 * count


def test_what_lasts_can_be_left_out():
    memory = LiveMemory()
    for lasting, known in ((True, 4_500), (False, 2_500)):
        memory.start()
        kept = torch.zeros(2_000)
        torch.zeros(2_500)
        assert memory.stop(lasting) == 4 * known
        del kept
