"""The linear form against logits made by one matrix product: values, gradients of hidden states and weights, memory."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from lm_envs.kernels import linear_logprob_kl as module
from lm_envs.kernels.linear_logprob_kl import linear_logprob_kl, linear_loss
from lm_envs.kernels.logprob_kl import LogprobKL, logprob_kl
from tests.house import CHECKOUT, python
from tests.kernels.cases import triton_on_cpu, triton_on_gpu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
WAYS = [
    pytest.param("torch", "cpu"),
    pytest.param("chunks", "cpu"),
    pytest.param("tiled", "cpu", marks=triton_on_cpu),
    pytest.param("chunks", "cuda", marks=pytest.mark.gpu),
    pytest.param("tiled", "cuda", marks=[pytest.mark.gpu, triton_on_gpu]),
]


def heads(rows, width, vocabulary, dtype, device="cpu", seed=0):
    """hidden, weight, ref_hidden, ref_weight, ids, weights of the four results."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    ids = torch.randint(0, vocabulary, (rows,), generator=generator).to(device)
    ref_hidden, ref_weight = draw(rows, width + 3), draw(vocabulary, width + 3) * 0.3
    weights = torch.randn(4, rows, generator=generator, dtype=torch.float64).to(device)
    return draw(rows, width), draw(vocabulary, width) * 0.5, ref_hidden, ref_weight, ids, weights


def call(way, hidden, weight, ref_hidden, ref_weight, ids, weights, **options):
    """Results and the gradients in hidden and weight."""
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    found = linear_logprob_kl(h, w, ref_hidden, ref_weight, ids, implementation=way, **options)
    total = sum((a * x.double()).sum() for a, x in zip(weights, found, strict=True) if x is not None)
    return [x.detach() for x in found if x is not None], *torch.autograd.grad(total, (h, w))


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 6.0}])
def test_gradcheck(way, device, options):
    hidden, weight, ref_hidden, ref_weight, ids, _ = heads(5, 4, 19, torch.float64, device)
    hidden.requires_grad_()
    weight.requires_grad_()
    fast = way == "tiled" and device == "cpu"
    for output in (0, 2, 3):
        assert torch.autograd.gradcheck(
            lambda h, w, i=output: linear_logprob_kl(
                h, w, ref_hidden, ref_weight, ids, implementation=way, chunk_rows=2, **options
            )[i],
            (hidden, weight),
            fast_mode=fast,
            check_undefined_grad=False,
        )


@pytest.mark.parametrize(("way", "device"), WAYS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64(way, device, dtype):
    """At most plain torch's own plus rounding; in bfloat16 both round the logits."""
    data = heads(21, 40, 300, dtype, device)
    mask = torch.ones(21, dtype=torch.bool, device=device)
    mask[3] = mask[20] = False
    double = [x.double() if x.is_floating_point() else x for x in data]
    for options in ({}, {"temperature": 0.8, "mask": mask}):
        for two in (True, False):
            pick = lambda d, two=two: d if two else [*d[:2], None, None, *d[4:]]  # noqa: E731
            exact, plain = (call("torch", *pick(d), **options) for d in (double, data))
            found = call(way, *pick(data), chunk_rows=8, **options)
            flat = [[*x[0], *x[1:]] for x in (found, plain, exact)]
            for a, b, c in zip(*flat, strict=True):
                epsilon = (2e-6 if dtype == torch.float32 else 1e-2) * max(1.0, float(c.abs().max()))
                assert (a - c).abs().max() <= (b - c).abs().max() + epsilon


@pytest.mark.parametrize(("way", "device"), WAYS[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_rounded_forward_and_backward_alike(way, device, dtype):
    """Whole numbers, so products are exact and rounding alone decides: both directions see the rounded logits."""
    generator = torch.Generator().manual_seed(0)
    size = 7 if dtype == torch.bfloat16 else 16  # logits in the hundreds, or thousands: above 8 or 11 bits
    draw = lambda *shape: torch.randint(-size, size + 1, shape, generator=generator).to(dtype).to(device)  # noqa: E731
    data = [draw(9, 160), draw(40, 160), draw(9, 160), draw(40, 160), torch.arange(9, device=device)]
    weights = torch.ones(4, 9, dtype=torch.float64, device=device)
    exact = [(data[i].double() @ data[i + 1].double().t()) for i in (0, 2)]
    rounded = [x.to(dtype).double() for x in exact]
    assert max(float((a - b).abs().max()) for a, b in zip(exact, rounded, strict=True)) >= 0.5
    options = dict(temperature=64.0)
    found, dh, dw = call(way, *data, weights, **options)
    z = rounded[0].requires_grad_()
    known = logprob_kl(z, rounded[1], data[4], **options)
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-5, atol=1e-5)
    (dz,) = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, known, strict=True)), z)
    torch.testing.assert_close(dh.double(), dz @ data[1].double(), rtol=0, atol=0.02 * float(dh.double().abs().max()))


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_shapes_masks_and_nothing(way, device):
    hidden, weight, ref_hidden, ref_weight, ids, weights = heads(12, 5, 33, torch.float32, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1] * 2, dtype=torch.bool, device=device)
    clean = call(way, hidden[mask], weight, ref_hidden[mask], ref_weight, ids[mask], weights[:, mask], chunk_rows=3)
    hidden[~mask], ref_hidden[~mask], ids[~mask] = math.nan, math.inf, 10**9
    square = [x.view(3, 4, *x.shape[1:]) for x in (hidden, ref_hidden, ids, mask)]
    found = call(
        way, square[0], weight, square[1], ref_weight, square[2], weights.view(4, 3, 4), mask=square[3], chunk_rows=3
    )
    for a, b in zip(found[0], clean[0], strict=True):
        torch.testing.assert_close(a.view(-1)[mask], b, rtol=1e-6, atol=1e-6)
        assert (a.view(-1)[~mask] == 0).all()
    torch.testing.assert_close(found[1].view(12, 5)[mask], clean[1], rtol=1e-5, atol=1e-6)
    assert (found[1].view(12, 5)[~mask] == 0).all()
    torch.testing.assert_close(found[2], clean[2], rtol=1e-5, atol=1e-6)
    empty = call(way, hidden[:0], weight, None, None, ids[:0], weights[:, :0])
    assert empty[0][0].shape == (0,) and (empty[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_matter(dtype):
    data = heads(23, 8, 120, dtype)
    first = call("chunks", *data)
    for chunk_rows in (1, 7, 23, 100):
        other = call("chunks", *data, chunk_rows=chunk_rows)
        for a, b in zip([*first[0], *first[1:]], [*other[0], *other[1:]], strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("way", ["torch", "chunks"])
def test_bias_and_excluded_tokens(way, two):
    """Those of logits with the bias added and the tokens at -inf, and gradients of all three inputs."""
    hidden, weight, ref_hidden, ref_weight, ids, weights = heads(13, 4, 19, torch.float64)
    if not two:
        ref_hidden = ref_weight = None
    bias = torch.linspace(-2, 2, 19, dtype=torch.float64)
    mask = torch.arange(13) != 5
    ids[ids == 3] = 4

    def exclude(logits, rows):  # token 3 in the rows that are even among all
        logits[:, 3].masked_fill_(rows % 2 == 0, -math.inf)

    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    z = leaves[0] @ leaves[1].t() + leaves[2]
    r = ref_hidden @ ref_weight.t() if two else None
    for logits in (z.detach(), r) if two else (z.detach(),):
        exclude(logits, torch.arange(13))
    known = logprob_kl(z, r, ids, mask=mask, temperature=0.7)
    options = dict(bias=leaves[2], exclude=exclude, mask=mask, temperature=0.7)
    found = linear_logprob_kl(*leaves[:2], ref_hidden, ref_weight, ids, implementation=way, chunk_rows=4, **options)
    sums = [sum((a * x).sum() for a, x in zip(weights, got, strict=True) if x is not None) for got in (known, found)]

    def loss(got, rows):
        return sum((a[rows] * x).sum() for a, x in zip(weights, got, strict=True) if x is not None)

    sums.append(linear_loss(*leaves[:2], ref_hidden, ref_weight, ids, loss, chunk_rows=4, **options))
    first, *others = [[x, *torch.autograd.grad(x, leaves)] for x in sums]
    for other in others:
        for a, b in zip(other, first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="takes neither bias nor exclude"):
        linear_logprob_kl(*leaves[:2], None, None, ids, bias=bias, implementation="tiled")


def test_chunks_of_a_bfloat16_head_add_up_in_float32():
    """1,024 equal shares: a bfloat16 sum would stop growing at 256 of them."""
    rows = 1024
    hidden, ids = torch.ones(rows, 2, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
    weight = torch.tensor([[0.5, -0.25], [0.0, 0.25]], dtype=torch.bfloat16).requires_grad_()
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    found = linear_logprob_kl(hidden, weight, None, None, ids, bias=bias, chunk_rows=1).logprob
    p = torch.softmax(torch.tensor([0.25, 0.25], dtype=torch.float64), 0)[1]
    for gradient in torch.autograd.grad(found.sum(), (weight, bias)):
        torch.testing.assert_close(gradient.double().flatten()[0], rows * p, rtol=1e-2, atol=0)


@pytest.mark.parametrize("two", [True, False])
def test_only_what_is_asked_for(two, monkeypatch):
    """Frozen heads get no gradient and cost no product; without a KL gradient the reference's logits stay away."""
    hidden, weight, ref_hidden, ref_weight, ids, _ = heads(6, 8, 50, torch.float32)
    if not two:
        ref_hidden = ref_weight = None
    products = []
    for name in ("mm", "addmm_"):
        real = getattr(torch, name) if name == "mm" else torch.Tensor.addmm_
        target = torch if name == "mm" else torch.Tensor
        monkeypatch.setattr(target, name, lambda *a, real=real, **k: (products.append(1), real(*a, **k))[1])

    def count(h, w, result, **options):
        products.clear()
        found = linear_logprob_kl(h, w, ref_hidden, ref_weight, ids, **options)
        forward = len(products)
        if result is not None:
            getattr(found, result).sum().backward()
        return forward, len(products) - forward

    forward = 2 if two else 1
    live = hidden.clone().requires_grad_()
    assert count(hidden, weight, None) == (forward, 0)
    assert count(live, weight, "logprob") == (forward, 1)  # dh: the logits of the last chunk are still there
    assert count(hidden, weight.clone().requires_grad_(), "entropy") == (forward, 1)  # dw
    assert count(live, weight.clone().requires_grad_(), "logprob") == (forward, 2)
    assert count(live, weight, "logprob", chunk_rows=3) == (2 * forward, 3)  # logits again of the first, dh twice
    if two:
        assert count(live, weight.clone().requires_grad_(), "kl") == (2, 3)
    products.clear()
    both = (live, weight.clone().requires_grad_())
    linear_loss(*both, ref_hidden, ref_weight, ids, lambda found, rows: (found.kl if two else found.entropy).sum())
    assert len(products) == (4 if two else 3)  # the floor


@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_loss_is_the_loss_of_all_rows(two, dtype):
    hidden, weight, ref_hidden, ref_weight, ids, _ = heads(14, 8, 60, dtype)
    if not two:
        ref_hidden = ref_weight = None
    advantage = torch.randn(14, generator=torch.Generator().manual_seed(5))
    mask = advantage > -1

    def loss(found: LogprobKL, rows):
        term = -advantage[rows] * torch.exp(found.logprob - found.logprob.detach()) - 0.1 * found.entropy
        return (term if found.kl is None else term + 0.2 * found.kl + 0.1 * found.ref_logprob).sum() / 7

    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    whole = linear_logprob_kl(*leaves, ref_hidden, ref_weight, ids, mask=mask)
    kept = LogprobKL(*(None if x is None else x[mask] for x in whole))
    expected = loss(kept, mask.nonzero().squeeze(1))
    gradients = torch.autograd.grad(3 * expected, leaves)
    found = linear_loss(*leaves, ref_hidden, ref_weight, ids, loss, mask=mask, chunk_rows=4)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(3 * found, leaves), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        frozen = linear_loss(*leaves, ref_hidden, ref_weight, ids, loss, mask=mask)
    torch.testing.assert_close(frozen, found.detach(), rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"must return a scalar, got value \(14,\)"):
        linear_loss(*leaves, None, None, ids, lambda found, rows: found.logprob)


H, W, IDS = torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(2).long()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((H, W[:, :3], None, None, IDS), {}, r"do not fit; got hidden \(2, 4\) float32 on cpu, weight \(9, 3\)"),
        ((H, W, H, None, IDS), {}, "go together"),
        ((H, W, H, W[:8], IDS), {}, "same vocabulary"),
        ((H, W.double(), None, None, IDS), {}, "of one dtype"),
        ((H, W, None, None, IDS.float()), {}, "integers"),
        ((H, W, None, None, IDS + 9), {}, r"in \[0, 9\)"),
        ((H, W, None, None, IDS), {"mask": IDS}, "mask must be bool"),
        ((H, W, None, None, IDS), {"chunk_rows": 0}, "chunk_rows"),
        ((H, W, None, None, IDS), {"bias": torch.zeros(8)}, r"bias must be \(V,\)"),
        ((H, W, None, None, IDS), {"implementation": "native"}, "auto, torch, chunks, tiled"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob_kl(*arguments, **options)


MEMORY = """
import sys, torch
from pathlib import Path
from lm_envs.kernels.linear_logprob_kl import linear_logprob_kl
status = lambda name: next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(name)) * 1024
def run(rows):
    h, w = torch.randn(rows, 16, requires_grad=True), torch.randn(20000, 16, requires_grad=True)
    found = linear_logprob_kl(h, w, h.detach(), w.detach(), torch.zeros(rows).long(), chunk_rows=100)
    sum(x.sum() for x in found).backward()
run(100)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
run(int(sys.argv[1]))
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
def test_memory_does_not_grow_with_rows_times_vocabulary():
    few, many = (int(python("-c", MEMORY, rows, cwd=CHECKOUT, path=CHECKOUT)) for rows in ("200", "3200"))
    assert many - few < 0.15 * 3200 * 20000 * 4, (few, many)


def test_rows_of_a_chunk_follow_the_vocabulary():
    assert module._chunk_rows(None, torch.empty(50257, 1), 10**6) * 50257 <= module.CHUNK["cpu"]
    assert module._chunk_rows(None, torch.empty(100, 1), 7) == 7
