"""The vocabulary arithmetic: hand-computed values, identities, -inf logits, masked NaN (law 1) and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_envs.kernels.logprob_kl import log_softmax, logprob_kl


def test_hand_computed():
    z = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).double()
    r = torch.log(torch.tensor([[0.25, 0.25, 0.5]])).double()
    found = logprob_kl(z, r, torch.tensor([2]))
    assert found.logprob.item() == pytest.approx(math.log(0.25))
    assert found.ref_logprob.item() == pytest.approx(math.log(0.5))
    assert found.entropy.item() == pytest.approx(1.5 * math.log(2))
    assert found.kl.item() == pytest.approx(0.5 * math.log(2) + 0 - 0.25 * math.log(2))


def test_temperature_divides_both():
    z = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).double()
    hot = logprob_kl(z, z, torch.tensor([0]), temperature=2.0)
    weights = [math.sqrt(p) for p in (0.5, 0.25, 0.25)]
    assert hot.logprob.item() == pytest.approx(math.log(weights[0] / sum(weights)))
    assert hot.kl.item() == pytest.approx(0, abs=1e-15)


logits = st.lists(st.floats(-20, 20), min_size=1, max_size=9)


@settings(deadline=None, max_examples=100)
@given(logits, st.data())
def test_properties(values, data):
    z = torch.tensor([values], dtype=torch.float64)
    r = torch.tensor([data.draw(st.lists(st.floats(-20, 20), min_size=len(values), max_size=len(values)))]).double()
    ids = torch.tensor([data.draw(st.integers(0, len(values) - 1))])
    found = logprob_kl(z, r, ids)
    assert -1e-12 <= found.entropy.item() <= math.log(len(values)) + 1e-12
    assert found.kl.item() >= -1e-12
    assert logprob_kl(z, z, ids).kl.item() == 0
    shifted = logprob_kl(z + 3, r - 5, ids)
    order = torch.randperm(len(values))
    permuted = logprob_kl(z[:, order], r[:, order], (order == ids).nonzero()[0])
    for a, b, c in zip(found, shifted, permuted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


def test_an_excluded_token_counts_for_nothing_and_has_a_finite_gradient():
    z = torch.tensor([[0.0, 1.0, float("-inf")]], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([[0.5, 0.0, float("-inf")]], dtype=torch.float64)
    found = logprob_kl(z, r, torch.tensor([1]))
    short = logprob_kl(z[:, :2], r[:, :2], torch.tensor([1]))
    for a, b in zip(found, short, strict=True):
        torch.testing.assert_close(a, b)
    (found.logprob + found.entropy + found.kl).sum().backward()
    assert z.grad.isfinite().all() and z.grad[0, 2] == 0


def test_a_reference_that_excludes_what_the_policy_does_is_infinitely_far():
    z, r = torch.zeros(1, 2), torch.tensor([[0.0, float("-inf")]])
    assert logprob_kl(z, r, torch.tensor([0])).kl.item() == math.inf


def test_masked_rows_may_hold_nan():
    z = torch.randn(4, 5, dtype=torch.float64)
    mask = torch.tensor([True, False, True, False])
    dirty = torch.where(mask[:, None], z, float("nan")).requires_grad_()
    ids = torch.tensor([1, -1, 2, 99])
    found = logprob_kl(dirty, torch.where(mask[:, None], z * 0.5, float("nan")), ids, mask=mask)
    clean = logprob_kl(z[mask], z[mask] * 0.5, ids[mask])
    for a, b in zip(found, clean, strict=True):
        torch.testing.assert_close(a[mask], b)
        assert (a[~mask] == 0).all()
    sum(x.sum() for x in found).backward()
    assert dirty.grad.isfinite().all() and (dirty.grad[~mask] == 0).all()


def test_gradients():
    torch.manual_seed(0)
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    r = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda a, b: tuple(logprob_kl(a, b, ids, temperature=0.7)), (z, r))


def test_low_precision_is_lifted_to_float32():
    assert log_softmax(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert (
        logprob_kl(torch.zeros(2, 3, dtype=torch.float64), None, torch.zeros(2).long()).logprob.dtype == torch.float64
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), None, torch.zeros(3).long()), "do not fit"),
        ((torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long()), "same vocabulary"),
    ],
)
def test_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        logprob_kl(*arguments)
    with pytest.raises(ValueError, match="temperature"):
        log_softmax(torch.zeros(1, 2), 0.0)
