"""Log-probabilities from hidden states are those of the model's own logits, whatever its head does to them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

from lm_envs.algos.policies.adaptation import Adaptation, adapted
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.kernels.logprob_kl import logprob_kl_reference
from lm_envs.model import forwards
from lm_envs.model.forwards import early_eos, response_forward, response_logprob
from lm_envs.model.output_head import OutputHead
from lm_envs.training import fit_language_model, next_token_loss
from lm_envs.trajectories import Trajectories
from tests.families import FAMILIES, WIDER, build, tolerance
from tests.lm_envs.model import test_encoder_decoder as seq2seq
from tests.tiny import EOS

PROMPT = torch.tensor([[-1, -1, 1, 2], [5, 6, 7, 8], [-1, 3, 9, 1]])
RESPONSE = torch.tensor([[3, 4, 5, EOS, -1], [1, 7, 1, 8, 6], [2, 4, EOS, -1, -1]])
MASK, IDS = RESPONSE >= 0, RESPONSE.clamp(min=0)
WEIGHTS = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def from_hidden(monkeypatch):
    """However few the logits are."""
    monkeypatch.setattr(forwards, "MOST_LOGITS", {"cpu": 0})


def both(model, **options):
    """Log-probability, entropy and all gradients, by ``response_forward`` and by the model's logits in plain torch."""
    leaves = [p for p in model.requires_grad_(True).parameters()]
    exclude = early_eos(5, EOS, 2)
    results = []
    for way in ("ours", "plain"):
        now = response_forward(model, PROMPT, RESPONSE, exclude)
        if way == "ours":
            assert now.head is not None
            found = now.logprob(IDS, temperature=0.7, mask=MASK)
        else:
            logits = model(**forwards._inputs(model, PROMPT, RESPONSE)).logits[:, -5:].clone()
            logits[:, :2, EOS] = -math.inf
            found = logprob_kl_reference(logits, None, IDS, temperature=0.7, mask=MASK)
            close(now.logits()[MASK], logits[MASK], **options)
        total = (WEIGHTS[0] * found.logprob).sum() + (WEIGHTS[1] * found.entropy).sum()
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        results.append([found.logprob, found.entropy, *(g for g in grads if g is not None)])
    return results


def close(a, b, atol):
    torch.testing.assert_close(
        a, b.to(a.dtype), rtol=0, atol=atol * max(1.0, float(b.detach()[b.isfinite()].abs().max()))
    )


@pytest.mark.parametrize("family", [*FAMILIES, *WIDER])
def test_every_familys_head_is_honored(family, from_hidden):
    limit = tolerance(family) if tolerance(family) < 1e-6 else 2e-4
    ours, plain = both(build(family), atol=limit)
    assert len(ours) == len(plain) > 3
    for a, b in zip(ours, plain, strict=True):
        close(a, b, atol=limit)


@pytest.mark.parametrize("family", seq2seq.FAMILIES)
def test_every_encoder_decoders_too(family, from_hidden):
    for a, b in zip(*both(seq2seq.build(family), atol=1e-9), strict=True):
        close(a, b, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "without"),
    [("Gemma2", {"softcap": None}), ("Cohere", {"scale": 1.0}), ("Granite", {"scale": 1.0}), ("Phi", {"bias": None})],
)
def test_a_head_that_is_not_honored_is_caught(family, without, from_hidden, monkeypatch):
    """Negative control: of each kind one family, computed without what its head does."""
    model = build(family)
    for name, parameter in model.named_parameters():
        if name.endswith("lm_head.bias"):
            parameter.data.normal_()
    made = forwards.hidden_and_head

    def plain_head(*given):
        hidden, head = made(*given)
        return hidden, dataclasses.replace(head, **without)

    known = response_forward(model, PROMPT, RESPONSE).logprob(IDS, mask=MASK).logprob
    monkeypatch.setattr(forwards, "hidden_and_head", plain_head)
    other = response_forward(model, PROMPT, RESPONSE).logprob(IDS, mask=MASK).logprob
    assert float((known - other).abs().max()) > 1e-2


def test_what_the_head_does_is_measured_and_not_looked_up(from_hidden):
    """Settings that the class knows by another name, or that are changed later."""
    model = build("Llama")
    assert response_forward(model, PROMPT, RESPONSE).head == OutputHead(model.lm_head.weight, None, 1.0, None)
    made = type(model).forward

    class Odd(type(model)):
        @functools.wraps(made)
        def forward(self, *given, **named):
            found = made(self, *given, **named)
            found.logits = self.then(found.logits)
            return found

    model.__class__ = Odd
    for then, scale, softcap in [
        (lambda z: 5 * torch.tanh(z / 5), 1.0, 5.0),
        (lambda z: 2.5 * torch.tanh(z / 5), 0.5, 2.5),
        (lambda z: z / 3 + torch.arange(10), 1 / 3, None),
    ]:
        model.then = then
        head = response_forward(model, PROMPT, RESPONSE).head
        assert (head.scale, head.softcap) == (pytest.approx(scale, rel=1e-9), softcap)
        for a, b in zip(*both(model, atol=1e-9), strict=True):
            close(a, b, atol=1e-9)
    model.then = lambda z: z / 3 + torch.arange(10)  # beside a bias of the layer's own
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 2, 10, dtype=model.dtype))
    for a, b in zip(*both(model, atol=1e-9), strict=True):
        close(a, b, atol=1e-9)
    model.lm_head.bias = None
    for then in (lambda z: z.relu(), lambda z: -z, lambda z: z.roll(1, -1), lambda z: z**3, lambda z: z.bfloat16()):
        model.then = then
        now = response_forward(model, PROMPT, RESPONSE)
        assert now.head is None  # so its logits are held
        torch.testing.assert_close(now.logits(), model(**forwards._inputs(model, PROMPT, RESPONSE)).logits[:, -5:])


def test_heads_that_are_no_plain_linear_layer_keep_their_logits(from_hidden):
    model = build("Llama")
    model.lm_head = nn.Sequential(model.lm_head)
    model.lm_head.weight = model.lm_head[0].weight
    assert response_forward(model, PROMPT, RESPONSE).head is None
    model = build("Llama")
    with model.lm_head.register_forward_hook(lambda _, given, out: 2 * out):
        now = response_forward(model, PROMPT, RESPONSE)
        assert now.head is None
    torch.testing.assert_close(now.logits(), 2 * response_forward(model, PROMPT, RESPONSE).logits())


def test_adapters_on_the_head(from_hidden):
    peft = pytest.importorskip("peft")
    model = build("Llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    assert response_forward(model, PROMPT, RESPONSE).head.adapters
    for a, b in zip(*both(model.double(), atol=1e-9), strict=True):
        close(a, b, atol=1e-9)
    saved = build("Llama")
    saved.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        saved.lm_head.modules_to_save["default"].weight.normal_()
    assert response_forward(saved, PROMPT, RESPONSE).head.weight is saved.lm_head.modules_to_save["default"].weight
    for a, b in zip(*both(saved.double(), atol=1e-9), strict=True):
        close(a, b, atol=1e-9)
    dora = build("Llama")
    dora.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    assert response_forward(dora, PROMPT, RESPONSE).head is None
    further = adapted(build("Llama"), Adaptation(lora_rank=2))
    assert response_forward(further, PROMPT, RESPONSE).head is not None


def test_law_7_and_the_reference_from_hidden_states(from_hidden):
    """The policy's numbers and its reference's are the same bits, with early EOS and a temperature."""
    model = build("Gemma2")
    policy = LMPolicy(copy.deepcopy(model), EOS, 4, 5, temperature=0.7, min_new_tokens=2)
    known = response_logprob(model, PROMPT, RESPONSE[:, :5], EOS, temperature=0.7, min_new_tokens=2)
    with torch.no_grad():
        now = response_forward(policy.model, PROMPT, RESPONSE, early_eos(5, EOS, 2))
    torch.testing.assert_close(now.logprob(IDS, temperature=0.7, mask=MASK).logprob, known, rtol=0, atol=1e-5)
    alone = response_logprob(model, PROMPT, RESPONSE, EOS, top_k=3, batch_size=1)
    assert bool((alone == -math.inf).any())
    torch.testing.assert_close(response_logprob(model, PROMPT, RESPONSE, EOS, top_k=3), alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_layer_computes_again_changes_no_gradient(family, monkeypatch):
    """Where logits are many, evaluation keeps a layer's products alone."""
    one = torch.ones(3, dtype=torch.bool)
    fields = dict(obs=torch.cat([PROMPT, RESPONSE], 1), actions=IDS, mask=MASK, prompt=PROMPT, response=RESPONSE)
    zeros = torch.zeros(3, 5)
    traj = Trajectories(**fields, logprob=zeros, reward=zeros, terminated=one, truncated=~one)
    found = []
    for chunk in (2**20, 0):
        monkeypatch.setattr(forwards, "MOST_LOGITS", {"cpu": chunk})
        policy = LMPolicy(build(family).requires_grad_(True), EOS, 4, 5)
        now = policy.evaluate(traj)
        total = (WEIGHTS[0] * now.logprob).sum() + (WEIGHTS[1] * now.entropy).sum()
        grads = torch.autograd.grad(total, list(policy.model.parameters()), allow_unused=True)
        found.append([now.logprob, *(g for g in grads if g is not None)])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        close(a, b, atol=tolerance(family) if tolerance(family) < 1e-6 else 2e-4)


def test_autocast_rounds_as_the_head_would(from_hidden):
    model = build("Llama").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        now = response_forward(model, PROMPT, RESPONSE)
        logits = model(**forwards._inputs(model, PROMPT, RESPONSE)).logits[:, -5:]
    assert now.head.weight.dtype is logits.dtype is torch.bfloat16
    known = logprob_kl_reference(logits, None, IDS, mask=MASK).logprob
    torch.testing.assert_close(now.logprob(IDS, mask=MASK).logprob, known, rtol=0, atol=2e-2)


def test_supervised_training_from_hidden_states(from_hidden, monkeypatch):
    texts = [[1, 2, 3, EOS], [4, 5, EOS], [6, 7, 8, 9, EOS]]
    options = dict(steps=3, batch_size=3, learning_rate=1e-2)
    ours = build("Gemma2").requires_grad_(True)
    found = fit_language_model(ours, texts, **options)
    monkeypatch.setattr(forwards, "MOST_LOGITS", {"cpu": 2**20})
    usual = build("Gemma2").requires_grad_(True)
    torch.testing.assert_close(found, fit_language_model(usual, texts, **options), rtol=1e-4, atol=1e-5)
    ids = torch.tensor([[1, 2, 3, EOS]])
    logits = ours(input_ids=ids[:, :-1]).logits
    now = response_forward(ours, ids[:, :1], ids[:, 1:])
    torch.testing.assert_close(next_token_loss(logits, ids[:, 1:]), next_token_loss(now.logits(), ids[:, 1:]))
