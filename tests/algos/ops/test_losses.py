"""Known answers, "reduces to" identities, and law 1 on values and gradients."""

import math

import pytest
import torch

from lm_envs.algos.ops import losses
from lm_envs.algos.ops.advantages import masked

NAN = float("nan")
MASK = torch.tensor([[True, True, True], [True, False, False]])


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_means_by_hand():
    x = rows([1, 2, 3], [10, NAN, NAN])
    assert losses.masked_mean(x, MASK) == 4  # 16 / 4 tokens
    assert losses.sequence_mean(x, MASK) == 8  # (6 + 10) / 2 rows
    assert losses.masked_mean(x, MASK) != x.nan_to_num(0).mean()  # negative control: padding counted
    assert [float(part) for part in losses.tally(x, MASK)] == [16, 4]


def test_policy_gradient_loss_by_hand():
    found = losses.policy_gradient_loss(rows([-1.0, -2.0]), rows([3.0, -0.5]), torch.ones(1, 2, dtype=torch.bool))
    assert found.tolist() == [[3.0, -1.0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, True),
        (1.5, 2.0, -2.4, False),  # clipped: a good action does not earn beyond 1.2
        (1.5, -2.0, 3.0, True),  # a bad action that got likelier is still pushed down
        (0.5, 2.0, -1.0, True),
        (0.5, -2.0, 1.6, False),  # clipped: a bad action is not pushed below 0.8
    ],
)
def test_ppo_clip_by_hand(ratio, advantage, loss, slope):
    one = torch.ones(1, 1, dtype=torch.bool)
    logprob = rows([math.log(ratio)]).requires_grad_()
    found = losses.ppo_clip_loss(logprob, rows([0.0]), rows([advantage]), one, 0.2)
    assert found.item() == pytest.approx(loss)
    found.sum().backward()
    assert bool(logprob.grad != 0) == slope


def test_ppo_at_ratio_one_has_the_policy_gradient():
    logprob = rows([-0.3, -1.0, -2.0], [-0.7, 0, 0]).requires_grad_()
    advantage = rows([1.0, -2.0, 0.5], [3.0, 0, 0])
    first = losses.ppo_clip_loss(logprob, logprob.detach(), advantage, MASK).sum()
    second = losses.policy_gradient_loss(logprob, advantage, MASK).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, logprob)[0] for x in (first, second)))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [(1.25, 2.0, -2.5, True), (1.5, 2.0, -2.56, False), (1.5, -2.0, 3.0, True), (0.5, -2.0, 1.6, False)],
)
def test_a_higher_clip_lets_the_ratio_grow(ratio, advantage, loss, slope):
    one = torch.ones(1, 1, dtype=torch.bool)
    logprob = rows([math.log(ratio)]).requires_grad_()
    found = losses.ppo_clip_loss(logprob, rows([0.0]), rows([advantage]), one, 0.2, 0.28)
    assert found.item() == pytest.approx(loss)
    found.sum().backward()
    assert bool(logprob.grad != 0) == slope


def test_row_weights_by_hand():
    x = rows([1, 2, 3], [10, NAN, NAN])
    for mean, expected in (("response", (2 + 10) / 2), ("token", 16 / 4), ("sum", (6 + 10) / 2)):
        weight = losses.row_weights(mean, MASK)
        assert float(losses.sequence_mean(weight.unsqueeze(1) * x, MASK)) == pytest.approx(expected), mean


def gradient_of(loss, logprob):
    return torch.autograd.grad(loss, logprob)[0]


def test_gspo_by_hand():
    """Ratios 2, 1/2, e and 1.5: their geometric means are e^(1/3) and 1.5."""
    new = rows([math.log(2), -math.log(2), 1.0], [math.log(1.5), NAN, NAN]).requires_grad_()
    old, advantage = rows([0, 0, 0], [0, NAN, NAN]), rows([2.0, 2.0, 2.0], [-1.0, NAN, NAN])
    ratio = losses.sequence_ratio(new, old, MASK)
    assert ratio.flatten().tolist() == pytest.approx([math.exp(1 / 3), 1.5])
    found = losses.gspo_loss(new, old, advantage, MASK, 0.2, 0.5)
    assert found[0].tolist() == pytest.approx([-2 * math.exp(1 / 3)] * 3) and float(found[1, 0]) == pytest.approx(1.5)
    clipped = losses.gspo_loss(new, old, advantage, MASK, 0.2, 0.3)
    assert clipped[0].tolist() == pytest.approx([-2 * 1.3] * 3)
    gradient = gradient_of(losses.sequence_mean(losses.row_weights("response", MASK)[:, None] * clipped, MASK), new)
    assert (gradient[0] == 0).all() and float(gradient[1, 0]) == pytest.approx(1.5 / 2)


def test_gspo_by_token_is_gspo_where_a_row_shares_its_advantage():
    new, old = rows([-0.3, -1.0, -2.0], [-0.7, 0, 0]).requires_grad_(), rows([-0.4, -0.8, -2.1], [-0.5, 0, 0])
    weight, found = losses.row_weights("response", MASK)[:, None], {}
    for shared, advantage in ((True, rows([1.5, 1.5, 1.5], [-2, 0, 0])), (False, rows([1.5, 0.5, 1], [-2, 0, 0]))):
        for by_token in (False, True):
            loss = losses.sequence_mean(weight * losses.gspo_loss(new, old, advantage, MASK, 0.2, 0.3, by_token), MASK)
            found[by_token] = (loss.detach(), gradient_of(loss, new))
        torch.testing.assert_close(found[False][0], found[True][0])
        assert torch.allclose(found[False][1], found[True][1]) == shared


def test_gspo_of_one_token_is_ppos_clip():
    one = torch.ones(3, 1, dtype=torch.bool)
    new, old, advantage = rows([-0.3], [-1.0], [-2.0]), rows([-1.0], [-1.1], [-1.0]), rows([1.0], [-2.0], [0.5])
    for by_token in (False, True):
        found = losses.gspo_loss(new, old, advantage, one, 0.2, 0.28, by_token)
        torch.testing.assert_close(found, losses.ppo_clip_loss(new, old, advantage, one, 0.2, 0.28))


def test_sapo_by_hand():
    """Ratios 2, 1/2, 1 and 3: the gate is 4 sigmoid(tau (rho - 1)) / tau, its slope 4 s (1 - s)."""
    new = rows([math.log(2), -math.log(2), 0.0], [math.log(3), NAN, NAN]).requires_grad_()
    old, advantage = rows([0, 0, 0], [0, NAN, NAN]), rows([2.0, 2.0, -1.0], [-3.0, NAN, NAN])
    found = losses.sapo_loss(new, old, advantage, MASK, 1.0, 2.2)  # a number that float32 rounds
    s = [1 / (1 + math.exp(-x)) for x in (1.0, -0.5, 0.0, 4.4)]
    assert found[0].tolist() == pytest.approx([-2 * 4 * s[0], -2 * 4 * s[1], 4 * s[2] / 2.2], rel=1e-12)
    assert float(found[1, 0].detach()) == pytest.approx(3 * 4 * s[3] / 2.2, rel=1e-12)
    slopes = [4 * x * (1 - x) for x in s]
    gradient = gradient_of(found.sum(), new)  # d rho / d log rho is rho
    assert gradient[0].tolist() == pytest.approx([-2 * slopes[0] * 2, -2 * slopes[1] / 2, slopes[2]])
    assert float(gradient[1, 0]) == pytest.approx(3 * slopes[3] * 3)


def test_sapo_at_ratio_one_is_reinforce_at_any_temperature():
    logprob, advantage = rows([-0.3, -1.0, -2.0], [-0.7, 0, 0]).requires_grad_(), rows([1.0, -2.0, 0.5], [3.0, 0, 0])
    plain = gradient_of(losses.policy_gradient_loss(logprob, advantage, MASK).sum(), logprob)
    for taus in ((1.0, 1.05), (0.1, 7.0)):
        found = losses.sapo_loss(logprob, logprob.detach(), advantage, MASK, *taus)
        torch.testing.assert_close(gradient_of(found.sum(), logprob), plain)


def test_cispo_by_hand():
    new, old = rows([math.log(0.9), math.log(0.1), 0.0], [math.log(0.2), NAN, NAN]).requires_grad_(), math.log(0.1)
    old, advantage = rows([old, math.log(0.2), 0.0], [math.log(0.4), NAN, NAN]), rows([2, 2, -1], [-3, NAN, NAN])
    found = losses.cispo_loss(
        new, old, advantage, MASK, 0.4, 4.0
    )  # ratios 9, 0.5, 1 and 0.5, bounded to 5, 0.6, 1, 0.6
    assert found[0].tolist() == pytest.approx([-5 * 2 * math.log(0.9), -0.6 * 2 * math.log(0.1), 0.0])
    assert float(found[1, 0]) == pytest.approx(0.6 * 3 * math.log(0.2))
    gradient = gradient_of(found.sum(), new)  # every token has one
    assert gradient[0].tolist() == pytest.approx([-10, -1.2, 1.0]) and float(gradient[1, 0]) == pytest.approx(1.8)


def test_cispo_at_ratio_one_is_reinforce():
    logprob, advantage = rows([-0.3, -1.0, -2.0], [-0.7, 0, 0]).requires_grad_(), rows([1.0, -2.0, 0.5], [3.0, 0, 0])
    found = losses.cispo_loss(logprob, logprob.detach(), advantage, MASK, 0.2)
    torch.testing.assert_close(found, losses.policy_gradient_loss(logprob, advantage, MASK))
    plain = gradient_of(losses.policy_gradient_loss(logprob, advantage, MASK).sum(), logprob)
    torch.testing.assert_close(gradient_of(found.sum(), logprob), plain)


def test_value_loss_by_hand():
    one = torch.ones(1, 1, dtype=torch.bool)
    assert losses.value_loss(rows([3.0]), rows([1.0]), one) == 2.0
    # V went from 0 to 3, clipped to 0.2: errors (3-5)^2 and (0.2-5)^2; the larger counts.
    clipped = losses.value_loss(rows([3.0]), rows([5.0]), one, rows([0.0]), 0.2)
    assert float(clipped) == pytest.approx(0.5 * 4.8**2)
    with pytest.raises(ValueError, match="old_value"):
        losses.value_loss(rows([3.0]), rows([5.0]), one, clip=0.2)


def test_a_wide_value_clip_is_no_clip():
    value, target, old = (
        rows([1.0, 2, 3], [4, 0, 0]),
        rows([2.0, 2, 2], [2, 0, 0]),
        rows([0.0, 0, 0], [0, 0, 0]),
    )
    wide = losses.value_loss(value, target, MASK, old, 100.0)
    torch.testing.assert_close(wide, losses.value_loss(value, target, MASK))


def test_nll_by_hand():
    assert losses.nll(rows([-1.0, -2, -3], [-4, NAN, NAN]), MASK).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_k_estimators_by_hand():
    one = torch.ones(1, 1, dtype=torch.bool)
    a, b = rows([-1.0]), rows([-1.5])
    assert losses.k1(a, b, one) == 0.5
    assert losses.k2(a, b, one) == 0.125
    assert float(losses.k3(a, b, one)) == pytest.approx(math.exp(-0.5) - 1 + 0.5)


def test_k_estimators_biases_are_as_documented():
    """Expectations under pi by enumeration of four actions: exact, no sampling."""
    logits = rows([0.3, -1.0, 0.8, 0.1]).requires_grad_()
    q = rows([1.0, 0.2, -0.5, 0.4]).log_softmax(dim=1)
    everything = torch.ones(1, 4, dtype=torch.bool)
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp().detach()
    kl = (log_p.exp() * (log_p - q)).sum()
    value = {k: (p * getattr(losses, k)(log_p, q, everything)).sum() for k in ("k1", "k2", "k3")}
    gradient = {k: torch.autograd.grad(v, logits, retain_graph=True)[0] for k, v in value.items()}
    exact = torch.autograd.grad(kl, logits)[0]
    torch.testing.assert_close(value["k1"], kl)
    torch.testing.assert_close(value["k3"], kl)
    assert not torch.allclose(value["k2"], kl)
    torch.testing.assert_close(gradient["k2"], exact)
    torch.testing.assert_close(gradient["k1"], torch.zeros_like(exact))
    assert not torch.allclose(gradient["k3"], exact)


def test_explained_variance():
    target = rows([1.0, 2, 3], [4, NAN, NAN])
    assert losses.explained_variance(target, target, MASK) == 1
    constant = rows([9.0, 9, 9], [9, NAN, NAN])
    assert losses.explained_variance(constant, target, MASK) == 0
    assert losses.explained_variance(rows([1.0, 3, 2], [4, 0, 0]), target, MASK) == pytest.approx(1 - 0.5 / 1.25)
    assert losses.explained_variance(target, constant, MASK).isnan()


def test_ratio_metrics_by_hand():
    new, old = rows([math.log(1.5), 0.0, math.log(0.9)], [0.0, NAN, NAN]), rows([0.0, 0, 0], [0, NAN, NAN])
    found = losses.ratio_metrics(new, old, MASK, 0.2)
    assert float(found["ratio"]) == pytest.approx((1.5 + 1 + 0.9 + 1) / 4)
    assert float(found["ratio_max"]) == pytest.approx(1.5)
    assert float(found["clip_fraction"]) == pytest.approx(0.25)
    assert float(losses.ratio_metrics(new, old, MASK, 0.05, 0.6)["clip_fraction"]) == pytest.approx(0.25)
    assert float(losses.ratio_metrics(new, old, MASK, 0.05)["clip_fraction"]) == pytest.approx(0.5)
    expected = (0.5 - math.log(1.5) - 0.1 - math.log(0.9)) / 4
    assert float(found["approx_kl"]) == pytest.approx(expected)


TWO = {
    "policy_gradient": lambda a, b: losses.policy_gradient_loss(a, b, MASK),
    "ppo_clip": lambda a, b: losses.ppo_clip_loss(a, b, b, MASK),
    "ppo_clip_high": lambda a, b: losses.ppo_clip_loss(a, b, b, MASK, 0.2, 0.28),
    "gspo": lambda a, b: losses.gspo_loss(a, b, b, MASK, 0.2),
    "gspo_by_token": lambda a, b: losses.gspo_loss(a, b, b, MASK, 0.2, None, True),
    "cispo": lambda a, b: losses.cispo_loss(a, b, b, MASK, 0.2),
    "sapo": lambda a, b: losses.sapo_loss(a, b, b, MASK, 1.0, 1.05),
    "value": lambda a, b: losses.value_loss(a, b, MASK, b, 0.1),
    "nll": lambda a, b: losses.nll(a, MASK),
    "k1": lambda a, b: losses.k1(a, b, MASK),
    "k2": lambda a, b: losses.k2(a, b, MASK),
    "k3": lambda a, b: losses.k3(a, b, MASK),
}


@pytest.mark.parametrize("mean", [losses.masked_mean, losses.sequence_mean])
@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("garbage", [NAN, float("inf"), 1e30])
def test_law_1_masked_positions_change_no_loss_and_no_gradient(name, mean, garbage):
    generator = torch.Generator().manual_seed(0)
    results = []
    for fill in (0.0, garbage):
        generator.manual_seed(0)
        a, b = (masked(torch.randn(2, 3, generator=generator).double(), MASK, fill) for _ in range(2))
        a.requires_grad_()
        loss = mean(TWO[name](a, b), MASK)
        loss.backward()
        results.append((loss.detach(), a.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[0][1].isnan().any()


def test_law_1_negative_control_cleaning_after_the_exponential_poisons_the_gradient():
    a = torch.tensor([[0.1, NAN]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    masked(torch.exp(a), mask).sum().backward()
    assert a.grad.isnan().any()
