"""Shares, what is gathered from them, and sums of gradients; processes are threads here."""

import numpy as np
import pytest
import torch

from lm_envs.model.loading import Placement
from lm_envs.processes import group, sharing
from tests.many import on_many


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_shares_are_whole_units_once_and_balanced(world):
    cost = np.array([9, 1, 1, 7, 2, 2, 8, 3, 3, 3])
    unit = np.array([0, 0, 0, 1, 1, 1, 2, 3, 3, 3])
    for found in on_many(world, lambda: sharing.shares(cost, unit)):
        assert sorted(np.concatenate(found).tolist()) == list(range(10))
        owners = [
            {rank for rank, rows in enumerate(found) if set(rows) & set(np.flatnonzero(unit == u))} for u in range(4)
        ]
        assert all(len(owner) == 1 for owner in owners)
    if world == 2:  # costs of units are 11, 11, 8 and 9
        assert [int(cost[rows].sum()) for rows in found] == [11 + 8, 11 + 9]


def test_rows_come_back_in_their_order_and_padded():
    """One process has wider rows than the other; a third has none."""

    def do():
        rows = sharing.shares(np.ones(3), np.array([5, 5, 9]))
        mine = rows[group.rank()]
        width = 2 + group.rank()
        x = torch.tensor([[float(row + 1)] * width for row in mine.tolist()])
        part = {"x": x, "none": None, "flat": torch.as_tensor(mine)} if len(mine) else {}
        return sharing.gather(rows, part, "a test", {"x": -1})

    for found in on_many(3, do):
        assert found["none"] is None
        assert found["flat"].tolist() == [0, 1, 2]
        assert found["x"].tolist() == [[1, 1, -1], [2, 2, -1], [3, 3, 3]]


def test_gradients_are_summed_and_those_of_nobody_stay_none(monkeypatch):
    monkeypatch.setattr(sharing, "BUCKET", 2)

    def do():
        parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
        parameters.append(torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
        parameters[0].grad = torch.full((2, 2), 1.0 + group.rank())
        if group.rank() == 1:
            parameters[1].grad = torch.ones(2, 2)
        parameters[3].grad = torch.tensor([256.0, 1.0] if group.rank() else [1.0, 1.0]).bfloat16()
        sharing.sum_gradients(parameters)
        return [None if p.grad is None else p.grad.float().flatten().tolist() for p in parameters]

    one, other = on_many(2, do)
    assert one == other == [[3.0] * 4, [1.0] * 4, None, [256.0, 2.0]]


def test_what_the_first_does_is_done_alone_and_known_to_all():
    done = []

    def do():
        return group.first(lambda: done.append(group.world()) or "said", "a test")

    assert on_many(3, do) == ["said"] * 3
    assert done == [1]


def test_differences_between_processes_are_named():
    def do():
        group.check_same({"torch": "2.1" if group.rank() == 2 else "2.0", "files": 1}, "a test")

    with pytest.raises(ValueError, match="differ in torch: process 0 has '2.0', process 2 has '2.1'"):
        on_many(3, do)


def test_one_process_shares_with_nobody():
    x = torch.ones(2)
    group.add(x, "nothing")
    assert (group.world(), group.rank(), group.exchange(5, "nothing"), x.tolist()) == (1, 0, [5], [1.0, 1.0])
    assert group.first(lambda: "mine", "nothing") == "mine"


def test_processes_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setattr(group, "count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes of this machine need a GPU each, and it has 2"):
        Placement(device="cuda")
    with pytest.raises(ValueError, match="cannot share 'cuda:1'"):
        Placement(device="cuda:1")
    Placement(device="cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # of several machines
    group.check_gpu("cuda:1")
