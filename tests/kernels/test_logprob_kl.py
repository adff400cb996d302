"""The vocabulary arithmetic: hand-computed values, identities, -inf logits, masked NaN (law 1) and gradients."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_envs.kernels import logprob_kl_native
from lm_envs.kernels.logprob_kl import Options, choose, log_softmax, logprob_kl
from tests.house import CHECKOUT, python


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


Z, IDS = torch.zeros(2, 3), torch.zeros(2).long()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Z, None, torch.zeros(3).long()), {}, "do not fit"),
        ((Z, torch.zeros(2, 4), IDS), {}, "same vocabulary"),
        ((torch.zeros(2, 0), None, IDS), {}, "V >= 1"),
        ((Z.long(), None, IDS), {}, "must be floating"),
        ((Z, Z, IDS.float()), {}, "must be integers"),
        ((Z, Z, IDS), {"mask": torch.ones(2)}, "mask must be bool"),
        ((Z, Z, IDS), {"mask": torch.ones(2, 3).bool()}, "of the shape of ids"),
        ((Z, torch.zeros(2, 3, device="meta"), IDS), {}, "on one device"),
        ((Z, Z, IDS + 3), {}, r"must be in \[0, 3\).*found 3 to 3"),
        ((Z, Z, IDS - 1), {}, "found -1 to -1"),
        ((Z.double(), Z.double(), IDS), {"implementation": "native"}, "takes float32 and bfloat16"),
        ((Z, Z, IDS), {"implementation": "native", "softcap": 3.0}, "has no softcap"),
        ((Z, Z.bfloat16(), IDS), {"implementation": "native"}, "one dtype"),
        ((Z.t().contiguous().t(), Z, IDS), {"implementation": "native"}, "stride 1"),
        ((Z, Z.clone().requires_grad_(), IDS), {"implementation": "native"}, "no gradient to ref_logits"),
    ],
)
def test_errors_name_shape_dtype_and_device(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        logprob_kl(*arguments, **options)
    for x in (*arguments, options.get("mask")):
        named = f"{tuple(x.shape)} {str(x.dtype)[6:]} on {x.device}" if x is not None else ""
        assert named in str(error.value) or (x is arguments[2] and "implementation" in options)


@pytest.mark.parametrize("number", [0.0, -1.0, math.inf, math.nan])
def test_numbers_that_make_no_sense(number):
    with pytest.raises(ValueError, match=f"temperature must be positive and finite.*{number}"):
        logprob_kl(Z, None, IDS, temperature=number)
    with pytest.raises(ValueError, match="softcap must be positive"):
        logprob_kl(Z, None, IDS, softcap=number)
    with pytest.raises(ValueError, match="temperature"):
        log_softmax(Z, number)
    with pytest.raises(ValueError, match="auto, torch, chunked, native, triton, got 'fast'"):
        logprob_kl(Z, None, IDS, implementation="fast")


def test_a_softcap_by_hand():
    z = torch.tensor([[1.0, 10.0, -math.inf]], dtype=torch.float64)
    capped = [2 * math.tanh(0.5) / 0.5, 2 * math.tanh(5.0) / 0.5]
    found = logprob_kl(z, None, torch.tensor([0]), softcap=2.0, temperature=0.5)
    assert found.logprob.item() == pytest.approx(capped[0] - math.log(sum(map(math.exp, capped))))


def test_auto_takes_what_fits(monkeypatch):
    def chosen(z, r=None, **options):
        return choose("auto", z, r, Options(**options))

    few, many = torch.zeros(64, 100), torch.zeros(600, 1000)
    fast = "native" if logprob_kl_native.unable(many, None, Options()) is None else "chunked"
    assert chosen(few) == "torch" and chosen(many) == chosen(many, many) == fast
    assert chosen(many.bfloat16()) == fast
    assert chosen(many.double()) == chosen(many.half()) == chosen(many, softcap=3.0) == "chunked"
    assert chosen(many, many.clone().requires_grad_()) == chosen(many, many.bfloat16()) == "chunked"
    with torch.no_grad():
        assert chosen(many, many.clone().requires_grad_()) == fast


def test_without_a_compiler(monkeypatch, tmp_path):
    """The fallback is chosen, and asking for "native" by name says what is missing."""
    many = torch.zeros(600, 1000)
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path))
    logprob_kl_native._library_or_reason.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setenv("CC", "no-such-compiler")
            assert choose("auto", many, None, Options()) == "chunked"
            with pytest.raises(ValueError, match="cannot be compiled here .*no-such-compiler"):
                logprob_kl(many, None, torch.zeros(600).long(), implementation="native")
            logprob_kl_native._library_or_reason.cache_clear()
            patch.setenv("CC", "false")
            assert choose("auto", many, None, Options()) == "chunked"
            assert not list(tmp_path.glob("native/*.so"))
    finally:
        logprob_kl_native._library_or_reason.cache_clear()


MEMORY = """
import sys, torch
from pathlib import Path
from lm_envs.kernels.logprob_kl import logprob_kl
status = lambda name: next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(name)) * 1024
def run(z, r, ids, implementation):
    return sum(x.sum() for x in logprob_kl(z, r, ids, implementation=implementation)).backward()
z, r = torch.randn(2, 500, 30000)
ids = torch.zeros(500, dtype=torch.int64)
z.requires_grad_()
for name in ("native", "chunked", "torch"):
    run(z[:60].detach().clone().requires_grad_(), r[:60], ids[:60], name)  # libraries loaded, threads started
    z.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run(z, r, ids, name)
    print((status("VmHWM") - before) / (z.numel() * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
def test_nothing_of_the_size_of_the_logits_but_the_gradient():
    native, chunked, plain = map(float, python("-c", MEMORY, cwd=CHECKOUT, path=CHECKOUT).split())
    assert 0.9 < native <= 1.15
    assert 0.9 < chunked <= 1.15
    assert plain > 3  # negative control
