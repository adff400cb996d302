"""Every implementation against the definition in float64: values, gradients, and the inputs that break kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_envs.kernels import logprob_kl_chunked, logprob_kl_native
from lm_envs.kernels.logprob_kl import LogprobKL, backend, log_softmax, logprob_kl
from tests.kernels.cases import (
    EVERY,
    FLOAT64,
    FUSED,
    assert_as_exact_as_plain_torch,
    cases,
    crossed,
    definition,
    example,
    with_gradient,
)

INF = math.inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter


@pytest.mark.parametrize(("implementation", "device"), FLOAT64)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0.7, "softcap": 4.0, "precise": True}])
def test_gradcheck(implementation, device, options, monkeypatch):
    """Through each output alone and through all of them, with a ragged last block."""
    z, r, ids = example(3, 19, torch.float64, device)
    z.requires_grad_()
    interpreted = implementation == "triton" and device == "cpu"
    if interpreted:
        for kernel in ("_forward_kernel", "_backward_kernel", "_precise_kernel"):
            monkeypatch.setitem(getattr(backend("triton"), kernel).configs[0].kwargs, "BLOCK", 16)

    def check(function):
        # a directional derivative instead of all of them where each call takes a tenth of a second
        assert torch.autograd.gradcheck(function, (z,), check_undefined_grad=False, fast_mode=interpreted)

    for output in () if interpreted else (0, 2, 3):
        check(lambda z, i=output: logprob_kl(z, r, ids, implementation=implementation, **options)[i])

    def weighted(z):  # an error in one output cannot cancel that in another
        found = logprob_kl(z, r, ids, implementation=implementation, **options)
        return sum(weight * x for weight, x in zip((1.0, 0.7, -1.9, 2.3), found, strict=True))

    check(weighted)
    check(lambda z: logprob_kl(z, None, ids, implementation=implementation, **options)[::2])


@pytest.mark.parametrize(("implementation", "device"), cases("torch", "chunked"))
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 4.0}])
def test_gradcheck_of_the_reference(implementation, device, options):
    z, r, ids = example(3, 11, torch.float64, device)
    mask = torch.tensor([True, False, True], device=device)
    options = {**options, "implementation": implementation, "mask": mask}
    for output in (1, 3):
        assert torch.autograd.gradcheck(
            lambda r, i=output: logprob_kl(z, r, ids, **options)[i], (r.clone().requires_grad_(),)
        )
    assert torch.autograd.gradcheck(
        lambda z, r: tuple(logprob_kl(z, r, ids, **options)),
        (z.clone().requires_grad_(), r.clone().requires_grad_()),
    )


@pytest.mark.parametrize(
    ("implementation", "device", "dtype", "vocabulary"),
    crossed(
        FUSED,
        [torch.float32, torch.bfloat16],
        [1, 2, 15, 16, 17, 1023, 1024, 1025, 2500],
        quick=lambda dtype, vocabulary: vocabulary in ((1, 17, 1025) if dtype == torch.float32 else (2, 1023)),
    ),
)
def test_error_against_float64_is_that_of_plain_torch(implementation, device, dtype, vocabulary):
    z, r, ids = example(7, vocabulary, dtype, device)
    ids[0], ids[1] = vocabulary - 1, 0
    mask = torch.tensor([1, 1, 1, 0, 1, 0, 1], dtype=torch.bool, device=device)
    weights = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).to(device)
    check, epsilon = assert_as_exact_as_plain_torch, 3e-6
    check(z, r, ids, weights, implementation, epsilon)
    check(z, None, ids, weights, implementation, epsilon, temperature=1.3, mask=mask)
    if vocabulary in (17, 2500):
        check(z, r, ids, weights, implementation, epsilon, temperature=0.7, mask=mask)
        check(z, r, ids, weights, implementation, epsilon, precise=True)
        if implementation != "native":
            check(z, r, ids, weights, implementation, epsilon, softcap=5.0, temperature=0.7)


@pytest.mark.parametrize(
    ("implementation", "device", "dtype", "temperature", "scale"),
    crossed(
        FUSED,
        [torch.float32, torch.bfloat16],
        [0.01, 0.7, 1.0, 3.0, 100.0],
        [1e-3, 1.0, 33.0, 3.3e3],
        quick=lambda *case: (
            case in [(torch.float32, 0.01, 3.3e3), (torch.float32, 0.7, 1.0), (torch.bfloat16, 0.7, 33.0)]
        ),
    ),
)
def test_error_against_float64_at_every_scale(implementation, device, dtype, temperature, scale):
    """Logits up to 1e4, and temperatures that are no powers of two: what backward recomputes is what forward summed."""
    for vocabulary in (1, 17, 1025):
        z, r, ids = example(5, vocabulary, dtype, device)
        z, r = z * scale, r * scale
        ids[0] = 0
        weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(device)
        for mixed in (weights, weights * torch.tensor([1.0, 0, 0, 0], device=device)[:, None]):
            exact, exact_gradient = definition(z, r, ids, mixed, temperature=temperature)
            plain, plain_gradient = with_gradient(z, r, ids, mixed, "torch", temperature=temperature)
            found, gradient = with_gradient(z, r, ids, mixed, implementation, temperature=temperature)
            for name, a, b, c in zip(LogprobKL._fields, found, plain, exact, strict=True):
                allowed = 3 * (b - c).abs().max() + 3e-6 * max(1.0, float(c.abs().max()) / 8)
                assert (a - c).abs().max() <= allowed, f"{name} of {vocabulary}: {(a - c).abs().max()}, {allowed}"
            if dtype == torch.bfloat16 and implementation == "triton":
                continue  # the interpreter cuts digits off where a GPU rounds
            worst = (gradient - exact_gradient).abs().max()
            allowed = 3 * (plain_gradient - exact_gradient).abs().max()
            # the gradient's terms cancel: their rounding is relative to the largest result, not to the gradient
            largest = max(float(c.abs().max()) for c in exact)
            allowed += 3e-6 * max(1.0, 0.1 * (1 + largest) / temperature, float(exact_gradient.abs().max()))
            assert worst <= allowed, f"gradient of {vocabulary}: {worst}, {allowed}"


logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=9)


@pytest.mark.parametrize(("implementation", "device"), FUSED)
@settings(deadline=None, max_examples=30)
@given(values=logits, data=st.data())
def test_properties(implementation, device, values, data):
    """Shift, permutation of the vocabulary, KL >= 0, KL(p||p) = 0, 0 <= H <= log V; a stated bound in float32."""
    count = len(values)
    z = torch.tensor([values], device=device)
    r = torch.tensor([data.draw(st.lists(st.floats(-20, 20, width=32), min_size=count, max_size=count))], device=device)
    ids = torch.tensor([data.draw(st.integers(0, count - 1))], device=device)

    def call(z, r, ids):
        return logprob_kl(z, r, ids, implementation=implementation)

    found = call(z, r, ids)
    assert -1e-6 <= found.entropy.item() <= math.log(count) + 1e-6
    assert found.kl.item() >= -1e-5
    assert abs(call(z, z, ids).kl.item()) <= 1e-12
    order = torch.randperm(count, device=device)
    others = (call(z + 32, r - 16, ids), call(z[:, order], r[:, order], (order == ids).nonzero()[0]))
    for other in others:
        for a, b in zip(found, other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("implementation", "device"), FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_excluded_tokens(implementation, device, dtype):
    """-inf logits: a whole first block and more, single tokens, in the policy alone, in both, and under the id."""
    z, r, ids = example(6, 5000, dtype, device)
    z[0, :4500] = -INF  # longer than any block here
    r[0, :1100] = -INF
    z[1, 7] = r[1, 7] = z[2, 4999] = -INF
    ids[2] = 4999
    z[3, :] = -INF
    z[3, 17] = 1.0  # one token is left
    ids[3] = 17
    z[4, 4096:] = r[4, 4096:] = -INF
    ids[0], ids[4] = 4700, 5
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"temperature": 0.9}
    exact, exact_gradient = definition(z, r, ids, weights, **options)
    found, gradient = with_gradient(z, r, ids, weights, implementation, **options)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert found[0][2] == -INF and found[2][3] == 0
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=tolerance, atol=1e-5)
    assert (gradient[0, :4500] == 0).all() and (gradient[3, :17] == 0).all()


@pytest.mark.parametrize(("implementation", "device"), cases("chunked", "triton"))
def test_excluded_tokens_stay_excluded_under_a_softcap(implementation, device):
    """Not a token of the least capped logit, in the policy or in the reference."""
    z, r, ids = example(4, 50, torch.float32, device)
    z[0, 10:] = z[1, 3] = r[1, 3] = r[2, :40] = z[2, :40] = -INF
    ids[:3] = torch.tensor([4, 5, 45], device=device)
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"softcap": 3.0, "temperature": 0.8}
    exact, exact_gradient = definition(z, r, ids, weights, **options)
    found, gradient = with_gradient(z, r, ids, weights, implementation, **options)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-5)
    short = z[:1, :10]  # the first row without what it excludes
    alone = logprob_kl(short, None, ids[:1], implementation=implementation, **options)
    torch.testing.assert_close(found[0][:1], alone.logprob)
    assert (gradient[0, 10:] == 0).all()


@pytest.mark.parametrize(("implementation", "device"), EVERY)
def test_a_reference_that_excludes_what_the_policy_does_not(implementation, device):
    """+inf, whose gradient is NaN; but nothing else of the row is spoiled, and no other row."""
    z, r, ids = example(3, 300, torch.float32, device)
    r[1, 7] = -INF
    ids[1] = 8
    z[2, 9], r[2, 9] = -300.0, -INF  # p = 0 in float32: counts for nothing
    weights = torch.ones(4, 3, device=device)
    found, gradient = with_gradient(z, r, ids, weights, implementation)
    assert found[3].isinf().tolist() == [False, True, False] and (found[3] > 0).all()
    assert gradient[0].isfinite().all() and not gradient[1].isfinite().all() and gradient[2].isfinite().all()
    if implementation != "torch":
        weights[3, 1] = 0
        _, gradient = with_gradient(z, r, ids, weights, implementation)
        _, alone = with_gradient(z, None, ids, weights, implementation)
        torch.testing.assert_close(gradient[1], alone[1])


@pytest.mark.parametrize(("implementation", "device"), EVERY)
def test_a_row_without_any_token_is_nan_and_alone_in_it(implementation, device):
    z, r, ids = example(3, 40, torch.float32, device)
    z[1] = -INF
    found = logprob_kl(z, r, ids, implementation=implementation)
    for x in (found.logprob, found.entropy, found.kl):
        assert x.isnan().tolist() == [False, True, False]
    z[1], z[0, 3] = 0.0, math.nan
    found = logprob_kl(z, r, ids, implementation=implementation)
    for x in (found.logprob, found.entropy, found.kl):
        assert x.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize(("implementation", "device"), EVERY)
def test_nothing_to_do(implementation, device):
    z = torch.randn(0, 9, device=device, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    found = logprob_kl(z, z.detach(), ids, implementation=implementation)
    assert [x.shape for x in found] == [(0,)] * 4
    sum(x.sum() for x in found).backward()
    assert z.grad.shape == (0, 9)
    z = torch.full((2, 3, 9), math.nan, device=device, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    found = logprob_kl(z, z.detach(), mask.long() - 7, mask=mask, implementation=implementation)
    assert all((x == 0).all() for x in found)
    sum(x.sum() for x in found).backward()
    assert (z.grad == 0).all()
    one = logprob_kl(torch.randn((), device=device).view(1), None, ids.new_zeros(()), implementation=implementation)
    assert one.logprob.shape == () and one.logprob == 0 and one.entropy == 0


@pytest.mark.parametrize(("implementation", "device"), FUSED)
def test_masked_rows_may_hold_anything(implementation, device):
    z, r, ids = example(6, 70, torch.float32, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool, device=device)
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(device)
    clean, clean_gradient = with_gradient(z[mask], r[mask], ids[mask], weights[:, mask], implementation)
    z[~mask], r[1], r[4], ids[~mask] = math.nan, math.inf, -math.inf, 10**9
    found, gradient = with_gradient(z, r, ids, weights, implementation, mask=mask)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[mask], b) and (a[~mask] == 0).all()
    assert torch.equal(gradient[mask], clean_gradient) and (gradient[~mask] == 0).all()


@pytest.mark.parametrize(("implementation", "device"), FUSED)
def test_layouts(implementation, device):
    """Slices, expanded rows, transposed vocabularies and gradients of stride 0 give what contiguous copies give."""
    whole, _, _ = example(2 * 5, 33, torch.float32, device)
    whole = whole.view(2, 5, 33)
    _, r, ids = example(2 * 3, 33, torch.float32, device, seed=3)
    r, ids = r.view(2, 3, 33), ids.view(2, 3)
    layouts = [
        (whole[:, -3:], r),
        (whole[:, 1:4], r[:1].expand(2, 3, 33)),
        (whole[:, 0:3].transpose(0, 1), r.transpose(0, 1)),
        (whole[:, :3, None], r[:, :, None]),
    ]
    if implementation != "native":
        layouts.append((whole[:, :3].transpose(1, 2).contiguous().transpose(1, 2), r[..., ::1]))
        layouts.append((torch.cat([whole, whole], -1)[:, :3, ::2][..., :33], r))
    for z, q in layouts:
        chosen = ids.reshape(z.shape[:-1])
        leaf = z.detach().requires_grad_()
        found = logprob_kl(leaf, q, chosen, implementation=implementation)
        sum(x.sum() for x in found).backward()  # upstream gradients of stride 0
        plain, plain_gradient = with_gradient(
            z.contiguous(), q.contiguous(), chosen, z.new_ones(4, *chosen.shape), implementation
        )
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(leaf.grad, plain_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("implementation", "device"), FUSED)
def test_blocks_do_not_matter(implementation, device, monkeypatch):
    """Neither the size of a block, nor the rows beside a row, nor threads, nor the parts a row is split in."""
    z, r, ids = example(3, 4500, torch.float32, device)
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(device)
    first = with_gradient(z, r, ids, weights, implementation, temperature=0.8)
    again = with_gradient(z, r, ids, weights, implementation, temperature=0.8)
    assert all(torch.equal(a, b) for a, b in zip([*first[0], first[1]], [*again[0], again[1]], strict=True))
    others = []
    if implementation == "chunked":
        monkeypatch.setattr(logprob_kl_chunked, "BLOCK", 1)
        monkeypatch.setattr(logprob_kl_chunked, "CUDA_BLOCK", 9001)
        others.append(with_gradient(z, r, ids, weights, implementation, temperature=0.8))
    elif implementation == "native":
        monkeypatch.setattr(logprob_kl_native, "BLOCK", 1)
        before = torch.get_num_threads()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            others.append(with_gradient(z, r, ids, weights, implementation, temperature=0.8))
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first[0], other[0], strict=True))
    else:
        module = backend("triton")
        for parts in (1, 2, 4):
            monkeypatch.setattr(module, "splits", lambda *_, parts=parts: parts)
            others.append(with_gradient(z, r, ids, weights, implementation, temperature=0.8))
        if device == "cpu":
            for block in (512, 8192):
                for kernel in (module._forward_kernel, module._backward_kernel, module._precise_kernel):
                    monkeypatch.setitem(kernel.configs[0].kwargs, "BLOCK", block)
                options = {"temperature": 0.8, "precise": block == 512}
                others.append(with_gradient(z, r, ids, weights, implementation, **options))
    assert others
    for found, gradient in others:
        for a, b in zip([*found, gradient], [*first[0], first[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("implementation", "device"), EVERY)
@pytest.mark.parametrize("near", [1e-3, 1e-5])
def test_tiny_kl(implementation, device, near):
    """Close to the reference the KL is about near^2 / 2: lost in float32, unless it is summed precisely."""
    z, r, ids = example(6, 3000, torch.float32, device, near=near)
    exact = logprob_kl(z.double(), r.double(), ids, precise=True, implementation="torch").kl
    assert (exact > 0).all() and (exact < near**2).all()
    plain = logprob_kl(z, r, ids, implementation=implementation).kl
    assert (plain >= -1e-6).all() and (plain - exact).abs().max() < 2e-6
    precise = logprob_kl(z, r, ids, precise=True, implementation=implementation).kl
    assert (precise >= 0).all()
    # u = log p - log q itself carries the rounding of two float32 logarithms
    torch.testing.assert_close(precise.double(), exact, rtol=2e-2 if near == 1e-3 else 2.0, atol=1e-12)
    z[:, 5:9] = -INF  # what the policy excludes, the reference's mass there belongs to the sum
    found = logprob_kl(z, r, ids, precise=True, implementation=implementation).kl
    exact = logprob_kl(z.double(), r.double(), ids, implementation="torch").kl
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("implementation", "device"), FUSED)
def test_frozen_inputs_cost_nothing(implementation, device, monkeypatch):
    z, r, ids = example(3, 50, torch.float32, device)
    assert not any(x.requires_grad for x in logprob_kl(z, r, ids, implementation=implementation))
    module = backend(implementation)
    seen = []
    real = module.backward

    def spy(given, *rest, **more):
        seen.append(given.r is None)
        return real(given, *rest, **more)

    monkeypatch.setattr(module, "backward", spy)
    leaf = z.clone().requires_grad_()
    found = logprob_kl(leaf, r, ids, implementation=implementation)
    assert not found.ref_logprob.requires_grad
    found.logprob.sum().backward(retain_graph=True)
    found.kl.sum().backward()
    assert seen == [True, False]  # the reference's logits are read again only for the KL


@pytest.mark.parametrize(("implementation", "device"), FUSED)
def test_results_may_be_changed_in_place(implementation, device):
    z, r, ids = example(3, 50, torch.float32, device)
    leaf = z.clone().requires_grad_()
    found = logprob_kl(leaf, r, ids, implementation=implementation)
    found.logprob.mul_(2.0)
    found.logprob.sum().backward()
    expected = 2 * (torch.nn.functional.one_hot(ids, 50) - log_softmax(z).exp())
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("implementation", "device"), [case for case in FUSED if case.values[1] == "cpu"])
def test_offsets_beyond_32_bits(implementation, device):
    """Three rows over 2^31 logits, in memory that is never touched between them."""
    distance, vocabulary = 2**30 + 12, 40  # the distance itself fits 32 bits, twice it does not
    storage = torch.empty(2 * distance + vocabulary, dtype=torch.bfloat16)  # 4 GiB asked for, two pages used
    z = storage.as_strided((3, vocabulary), (distance, 1))
    near = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)).bfloat16()
    z.copy_(near)
    ids = torch.tensor([3, 39, 7])
    for layout in (z, z.unsqueeze(1)):
        chosen = ids.view(layout.shape[:-1])
        found = logprob_kl(layout.requires_grad_(), layout.detach(), chosen, implementation=implementation)
        (gradient,) = torch.autograd.grad(found.logprob.sum(), layout)
        leaf = near.clone().requires_grad_()
        same = logprob_kl(leaf, near, ids, implementation=implementation)
        (expected,) = torch.autograd.grad(same.logprob.sum(), leaf)
        assert all(torch.equal(a.view(-1), b) for a, b in zip(found, same, strict=True))
        assert torch.equal(gradient.view(3, -1), expected)


@pytest.mark.gpu
def test_nothing_is_compiled_again():
    """Not for another temperature or softcap, number of rows, or vocabulary of like size and divisibility."""
    module = backend("triton")

    def compiled():
        kernels = (module._forward_kernel, module._backward_kernel, module._combine_kernel)
        caches = [getattr(kernel, "fn", kernel).device_caches for kernel in kernels]
        return sum(len(entry[0]) for cache in caches for entry in cache.values())

    counts = []
    for rows, vocabulary, temperature in ((64, 5008, 1.0), (64, 5008, 0.7), (63, 5008, 1.3), (65, 6000, 1.1)):
        z, r, ids = example(rows, vocabulary, torch.bfloat16, "cuda")
        with_gradient(z, r, ids, torch.ones(4, rows, device="cuda"), "triton", temperature=temperature)
        counts.append(compiled())
    assert len(set(counts)) == 1, counts
