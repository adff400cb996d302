"""Known answers, identities and law 5, each with what the wrong variant would have given."""

import math

import pytest
import torch

from lm_envs.algos.ops import advantages as adv

NAN = float("nan")


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


MASK = torch.tensor([[True, True, True], [True, True, False]])
REWARD = rows([1.0, 2.0, 3.0], [4.0, 5.0, NAN])
# Row 0 terminated: 0 after its last step. Row 1 was truncated: V(final_obs) = 7 at its length.
VALUE = rows([0.5, 1.0, 1.5, 0.0], [2.0, 3.0, 7.0, NAN])


def test_discounted_returns_by_hand():
    found = adv.discounted_returns(REWARD, MASK, 0.5, bootstrap=rows(0.0, 8.0))
    torch.testing.assert_close(found, rows([1 + 0.5 * 3.5, 2 + 1.5, 3], [4 + 0.5 * 9, 5 + 4, 0]))


def test_returns_without_discount_are_the_rewards_to_go():
    torch.testing.assert_close(adv.discounted_returns(REWARD, MASK), rows([6, 5, 3], [9, 5, 0]))


def test_gae_by_hand():
    gamma, lam = 0.9, 0.5
    last = 3 - 1.5
    middle = 2 + gamma * 1.5 - 1.0 + gamma * lam * last
    first = 1 + gamma * 1.0 - 0.5 + gamma * lam * middle
    end = 5 + gamma * 7.0 - 3.0
    start = 4 + gamma * 3.0 - 2.0 + gamma * lam * end
    found = adv.gae(REWARD, VALUE, MASK, gamma, lam)
    torch.testing.assert_close(found, rows([first, middle, last], [start, end, 0]))


def test_gae_with_lambda_one_is_the_return_minus_v():
    bootstrap = adv.value_at_end(VALUE, MASK)
    assert bootstrap.tolist() == [0.0, 7.0]
    returns = adv.discounted_returns(REWARD, MASK, 0.9, bootstrap)
    expected = adv.masked(returns - VALUE[:, :-1], MASK)
    torch.testing.assert_close(adv.gae(REWARD, VALUE, MASK, 0.9, 1.0), expected)


def test_gae_with_lambda_zero_is_the_one_step_error():
    expected = adv.masked(REWARD + 0.9 * VALUE[:, 1:] - VALUE[:, :-1], MASK)
    torch.testing.assert_close(adv.gae(REWARD, VALUE, MASK, 0.9, 0.0), expected)


def test_law_5_truncation_bootstraps_and_termination_does_not():
    reward, mask = rows([1.0], [1.0]), torch.ones(2, 1, dtype=torch.bool)
    value = rows([2.0, 0.0], [2.0, 10.0])  # the same state and reward; the first terminated, the second was cut
    advantage = adv.gae(reward, value, mask, 0.9, 1.0)[:, 0]
    torch.testing.assert_close(advantage, rows(1 - 2.0, 1 + 9 - 2.0).reshape(-1))
    wrong = adv.gae(reward, torch.tensor([[2.0, 10.0], [2.0, 10.0]]).double(), mask, 0.9, 1.0)[:, 0]
    assert not torch.allclose(advantage, wrong)  # negative control: a bootstrap after termination is seen


def test_gae_rejects_values_of_the_wrong_width():
    with pytest.raises(ValueError, match=r"\(B, T\+1\)"):
        adv.gae(REWARD, VALUE[:, :-1], MASK)


def test_whitening_uses_unmasked_positions_and_population_variance():
    x = rows([1.0, 3.0, 5.0], [7.0, 9.0, NAN])
    found = adv.whiten(x, MASK)
    mean, var = 5.0, (16 + 4 + 0 + 4 + 16) / 5
    scale = math.sqrt(var + 1e-8)
    torch.testing.assert_close(found, rows([-4, -2, 0], [2, 4, 0]) / scale)
    kept = adv.whiten(x, MASK, shift_mean=False)
    torch.testing.assert_close(kept[MASK], (found + mean)[MASK])
    assert kept[1, 2] == 0
    sample_variance = x[MASK].var(unbiased=True)  # negative control: the other convention differs
    assert not math.isclose(float(sample_variance), var)


def test_group_statistics_by_hand():
    x, group = torch.tensor([1.0, 2.0, 3.0, 10.0]).double(), torch.tensor([7, 3, 7, 3])
    assert adv.group_mean(x, group).tolist() == [2, 6, 2, 6]
    assert adv.group_std(x, group).tolist() == [1, 4, 1, 4]
    assert adv.leave_one_out(x, group).tolist() == [3, 10, 1, 2]
    assert adv.leave_one_out(x).tolist() == [5, 14 / 3, 13 / 3, 2]
    table = torch.stack([x, 2 * x], dim=1)
    assert adv.leave_one_out(table, group)[:, 1].tolist() == [6, 20, 2, 4]


def test_leave_one_out_is_the_mean_baseline_times_k_over_k_minus_1():
    x = torch.arange(5.0).double() ** 2
    torch.testing.assert_close(x - adv.leave_one_out(x), (x - adv.group_mean(x)) * 5 / 4)


def test_leave_one_out_needs_two():
    with pytest.raises(ValueError, match="group_size"):
        adv.leave_one_out(torch.ones(3), torch.tensor([0, 0, 1]))


def test_extend_repeats_the_last_entry():
    assert adv.extend(rows([1, 2, 3], [4, 5, NAN]), MASK).tolist() == [[1, 2, 3], [4, 5, 5]]


def test_running_mean_has_no_bias_to_its_start():
    mean, weight = adv.running_mean(0.0, 0.0, 10.0, 0.9)
    assert mean / weight == pytest.approx(10)
    mean, weight = adv.running_mean(mean, weight, 20.0, 0.9)
    assert mean / weight == pytest.approx((0.9 * 10 + 20) / 1.9)


@pytest.mark.parametrize(
    "function",
    [
        lambda r, v: adv.gae(r, v, MASK, 0.9, 0.8),
        lambda r, v: adv.discounted_returns(r, MASK, 0.9),
        lambda r, v: adv.whiten(r, MASK),
        lambda r, v: adv.extend(r, MASK),
        lambda r, v: adv.value_at_end(v, MASK),
    ],
)
def test_law_1_masked_values_change_nothing(function):
    clean = function(REWARD.nan_to_num(0.0), VALUE.nan_to_num(0.0))
    assert torch.equal(function(REWARD, VALUE), clean)
    assert not clean.isnan().any()


def test_law_1_negative_control_a_product_with_the_mask_keeps_nan():
    assert (REWARD * MASK).isnan().any()
