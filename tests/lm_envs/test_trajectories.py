"""Trajectories: what is refused at construction, and that cutting, joining and flattening keep every real step."""

import pytest
import torch

from lm_envs.trajectories import Trajectories, demonstrations


def text(lengths=(2, 3), width=2, **changes):
    rows, steps = len(lengths), max(lengths)
    mask = torch.arange(steps) < torch.tensor(lengths)[:, None]
    response = torch.where(mask, torch.arange(rows * steps).reshape(rows, steps), -1)
    prompts = torch.full((rows, width), 50)
    true = torch.ones(rows, dtype=torch.bool)
    fields = dict(
        actions=response.clamp(min=0),
        mask=mask,
        terminated=true,
        truncated=~true,
        obs=torch.cat([prompts, response], dim=1),
        logprob=-torch.rand(rows, steps),
        reward=torch.rand(rows, steps),
        group=torch.arange(rows),
        prompt=prompts,
        response=response,
    )
    return Trajectories(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.tensor([[True, True, False], [True, False, True]])}, "prefix of every row; row 1"),
        ({"mask": torch.tensor([[True, True, False], [False, False, False]])}, "at least one real action"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"reward": torch.zeros(2, 4)}, r"reward must start with \(2, 3\), got shape \(2, 4\)"),
        ({"group": torch.zeros(3, dtype=torch.int64)}, r"group must be \(2,\)"),
        ({"group": torch.zeros(2)}, "group must be int64"),
        ({"truncated": torch.ones(2, dtype=torch.bool)}, "both terminated and truncated"),
        ({"prompt": torch.zeros(3, 2, dtype=torch.int64)}, r"prompt must start with \(2,\), got shape \(3, 2\)"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        text(**changes)


def test_trim_cuts_every_axis_that_counts_steps():
    short = text((2, 5)).select(slice(0, 1)).trim()
    assert short.mask.shape == (1, 2)
    assert short.reward.shape == short.response.shape == (1, 2)
    assert short.obs.tolist() == [[50, 50, 0, 1]]


def test_concatenate_pads_the_response_right_and_the_prompt_left():
    joined = Trajectories.concatenate([text((2, 3)), text((1,), width=4)])
    assert joined.prompt.tolist() == [[-1, -1, 50, 50]] * 2 + [[50] * 4]
    assert joined.response.tolist() == [[0, 1, -1], [3, 4, 5], [0, -1, -1]]
    assert joined.obs[0].tolist() == [-1, -1, 50, 50, 0, 1, -1]
    assert joined.lengths.tolist() == [2, 3, 1]


def test_flatten_makes_every_real_step_a_row():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    nothing = torch.zeros(2, dtype=torch.bool)
    control = Trajectories(
        actions=torch.tensor([[1, 2, 3], [4, 9, 9]]), mask=mask, terminated=nothing, truncated=~nothing,
        obs=torch.arange(12.0).reshape(2, 3, 2), final_obs=torch.zeros(2, 2),
    )  # fmt: skip
    flat = control.flatten()
    assert flat.terminated.all() and not flat.truncated.any() and flat.final_obs is None
    assert flat.actions.tolist() == [[1], [2], [3], [4]]
    assert flat.obs[:, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="for control"):
        text().flatten()


def test_bandit_trajectories_keep_their_response_axis():
    whole = torch.tensor([[[3, 0, 0]], [[4, 5, 0]]])
    ones = torch.ones(2, 1, dtype=torch.bool)
    traj = Trajectories(
        actions=whole, mask=ones, terminated=ones[:, 0], truncated=~ones[:, 0],
        prompt=torch.ones(2, 1, dtype=torch.int64), response=torch.tensor([[3, 0, -1], [4, 5, 0]]),
    )  # fmt: skip
    assert traj.is_bandit
    assert traj.response_lengths.tolist() == [2, 3]
    assert traj.select(torch.tensor([0])).trim().actions.tolist() == [[[3, 0]]]


def test_control_of_different_lengths_is_joined_with_zeros():
    """Observations of control are numbers, and what is beyond the end of a row is masked."""
    parts = []
    for steps in (1, 3):
        ones = torch.ones(1, steps, dtype=torch.bool)
        parts.append(
            Trajectories(
                actions=ones.long() * 2, mask=ones, terminated=ones[:, 0], truncated=~ones[:, 0],
                obs=torch.ones(1, steps, 2), reward=torch.full((1, steps), 4.0), value=torch.full((1, steps + 1), 5.0),
                final_obs=torch.zeros(1, 2),
            )
        )  # fmt: skip
    joined = Trajectories.concatenate(parts)
    assert joined.mask.tolist() == [[True, False, False], [True] * 3] and joined.actions.tolist() == [
        [2, 0, 0],
        [2] * 3,
    ]
    assert joined.reward[0].tolist() == [4, 0, 0] and joined.value[0].tolist() == [5, 5, 0, 0]
    assert joined.obs.shape == (2, 3, 2) and joined.obs[0, 0].tolist() == [1, 1] and joined.final_obs.shape == (2, 2)


def test_demonstrations_are_cut_at_their_end():
    found = demonstrations([[1, 2, 3, 4, 5, 6], [1, 2, 7]], 2, 3, group=[4, 4])
    assert found.prompt.tolist() == [[1, 2]] * 2 and found.response.tolist() == [[3, 4, 5], [7, -1, -1]]
    assert found.group.tolist() == [4, 4] and found.terminated.all() and found.reward is None
