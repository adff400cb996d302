"""Faster products: the numbers and gradients of torch's own, taken only where they pay, and invisible from outside."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model import fast_layers
from tests.tiny import gpt2, task

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def everywhere(monkeypatch):
    """As on a processor where it pays, and for products of any size."""
    monkeypatch.setattr(fast_layers, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(fast_layers, "WORTH", 1)


def layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = Conv1D(24, 40)  # out, in
        nn.init.normal_(conv.weight)
        nn.init.normal_(conv.bias)
        return [nn.Linear(40, 24), nn.Linear(40, 24, bias=False), conv]


@needs_onednn
@pytest.mark.parametrize("shape", [(40,), (7, 40), (3, 5, 40)])
@pytest.mark.parametrize("number", range(3))
def test_products_and_gradients_are_as_exact_as_torchs(everywhere, number, shape):
    plain = layers()[number]
    fast = fast_layers.fuse_linears(nn.Sequential(copy.deepcopy(plain)))[0]
    assert type(fast) in (fast_layers.FastLinear, fast_layers.FastConv1D)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(24, generator=torch.Generator().manual_seed(2))

    def run(layer, dtype):
        layer, given = layer.to(dtype), x.to(dtype, copy=True).requires_grad_()
        out = layer(given)
        (out.tanh() * weight.to(dtype)).sum().backward()
        return [out.detach(), given.grad, *(p.grad for p in layer.parameters())]

    exact = run(copy.deepcopy(plain), torch.float64)
    ours, theirs = run(fast, torch.float32), run(plain, torch.float32)
    for got, usual, right in zip(ours, theirs, exact, strict=True):
        assert got.shape == right.shape
        assert (got - right).abs().max() <= 2 * (usual - right).abs().max() + 1e-6
        assert right.abs().max() > 0.1
    with torch.no_grad():  # the way without gradients, for a frozen layer and for sampling
        torch.testing.assert_close(fast(x), ours[0], rtol=0, atol=1e-6)


@needs_onednn
def test_what_it_cannot_do_or_is_not_worth_it_is_left_to_torch(monkeypatch):
    layer = nn.Linear(40, 24)
    layer.__class__ = fast_layers.FastLinear
    calls = []
    original = fast_layers._product
    monkeypatch.setattr(fast_layers, "_product", lambda *given: calls.append(given) or original(*given))
    x = torch.randn(7, 40)
    layer(x)
    assert not calls  # 7 * 40 * 24 multiplications
    monkeypatch.setattr(fast_layers, "WORTH", 7 * 40 * 24)
    layer(x)
    assert len(calls) == 1
    layer(x[:6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer.double()(x.double()).dtype is torch.float64
    assert len(calls) == 1


@needs_onednn
def test_a_model_keeps_its_parameters_its_ties_and_its_name(everywhere):
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    stock = GPT2LMHeadModel(config).eval()
    held = {name: p for name, p in stock.named_parameters()}
    fast = fast_layers.fuse(copy.deepcopy(stock))
    assert fast_layers.fuse(stock) is stock and all(p is held[name] for name, p in stock.named_parameters())
    assert type(fast) is GPT2LMHeadModel and isinstance(fast.transformer.h[0].mlp.c_fc, Conv1D)
    assert type(fast.lm_head) is fast_layers.FastLinear and fast.lm_head.weight is fast.transformer.wte.weight
    again = copy.deepcopy(fast)
    assert type(again.lm_head) is fast_layers.FastLinear and again.state_dict().keys() == fast.state_dict().keys()
    ids = torch.tensor([[1, 2, 3, 4]])
    plain = GPT2LMHeadModel(config).eval()
    plain.load_state_dict(fast.state_dict())
    assert type(plain.lm_head) is nn.Linear
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


@needs_onednn
def test_law_2_in_float32_with_the_fast_products(everywhere):
    """Step path and bulk path sample the same tokens and pay the same rewards."""
    single = task(reference=gpt2(dtype=torch.float32))
    assert type(single.reference.lm_head) is fast_layers.FastLinear
    env = TextVectorEnv(single, 4)
    policy = LMPolicy.for_mdp(env.mdp, copy.deepcopy(single.reference))
    stepped, bulk = (sample(env, policy, episodes=12, seed=3) for sample in (collect, rollout))
    assert torch.equal(stepped.response, bulk.response)
    torch.testing.assert_close(stepped.reward, bulk.reward, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_where_it_is_taken(monkeypatch, about, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: about)
    there = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    assert fast_layers.onednn_is_faster.__wrapped__() is (expected and there)
    monkeypatch.setattr(fast_layers, "_product", lambda *given: torch.ops.mkldnn.no_such_operation(*given))
    assert fast_layers.onednn_is_faster.__wrapped__() is False  # a torch without the operation


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr(fast_layers, "onednn_is_faster", lambda: False)
    assert type(fast_layers.fuse_linears(nn.Sequential(nn.Linear(2, 2)))[0]) is nn.Linear


def test_the_activation_is_torchs_with_gradients_and_without():
    x = torch.linspace(-12, 12, 4001)
    for given in (x, x.double(), x.bfloat16(), torch.tensor([0.0, -0.0, 1e-30, 60.0, -60.0])):
        exact = nn.functional.gelu(given.double(), approximate="tanh")
        usual = nn.functional.gelu(given, approximate="tanh")
        ours = fast_layers.TanhGELU()(given)
        assert ours.dtype == given.dtype
        assert (ours - exact).abs().max() <= 2 * (usual - exact).abs().max() + 1e-6
        learns = given.clone().requires_grad_()
        fast_layers.TanhGELU()(learns).sum().backward()
        plain = given.clone().requires_grad_()
        nn.functional.gelu(plain, approximate="tanh").sum().backward()
        assert torch.equal(learns.grad, plain.grad)


def test_the_activation_leaves_its_input_alone():
    x = torch.randn(3, 5, 40)
    before = x.clone()
    with torch.no_grad():
        fast_layers.TanhGELU()(x)
    assert torch.equal(x, before)
