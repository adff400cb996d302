"""Every claimed family of models: padding changes nothing (law 4), rows may be swapped at any time, stepping is bulk
(law 2), the policy's numbers are the model's own, and PPO trains it (law 7)."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model.decoding import Decoder, generate
from lm_envs.model.forwards import response_forward, response_logprob
from lm_envs.model.kv_cache import GrowingLayer, can_cache
from lm_envs.model.tokens import left_pad
from tests import tiny
from tests.families import FAMILIES, QUICK, WIDER, build, close, tolerance
from tests.house import CHECKOUT
from tests.marks import slow_unless
from tests.tiny import EOS

TEMPERATURE = 0.8
EACH = slow_unless(QUICK.__contains__, FAMILIES)


def alone(model, tokens):
    """Next-token logits of one text, unpadded and without a cache."""
    return model(input_ids=torch.as_tensor(tokens)[None], use_cache=False).logits[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_padding_changes_no_logprob(family):
    model = build(family)
    prompt, response = torch.tensor([1, 2]), torch.tensor([3, 4, 5, 6, 7, EOS])
    plain = response_forward(model, prompt[None], response[None]).logits()
    for t in range(6):  # and they are those of the model itself
        close(family, plain[0, t], alone(model, [1, 2, *response[:t].tolist()]))
    padded = response_forward(
        model,
        torch.tensor([[-1, -1, -1, 1, 2], [5, 6, 7, 8, 9]]),
        torch.tensor([[3, 4, 5, 6, 7, EOS, -1, -1], [1, 1, 1, 1, 1, 1, 1, 1]]),
    )
    close(family, padded.logits()[0, :6], plain[0])
    assert padded.hidden.shape[:2] == (2, 8) and plain[0].std(dim=0).min() > 1e-4


@pytest.mark.parametrize("family", EACH)
def test_the_decoder_under_any_use_is_the_model(family):
    model = build(family)
    assert can_cache(model)
    decoder, generator = Decoder(model), np.random.default_rng(0)
    places, steps, rows = 4, 8, 4
    obs = torch.full((rows, places + steps), -1)

    def restart(row):
        length = generator.integers(1, places + 1)
        obs[row] = -1
        obs[row, places - length : places] = torch.tensor(generator.integers(0, 10, length))

    for row in range(rows):
        restart(row)
    for _ in range(20):
        logits = decoder(obs)
        for row in range(rows):
            close(family, logits[row], alone(model, obs[row][obs[row] >= 0]))
        for row in range(rows):
            length = int((obs[row, places:] >= 0).sum())
            what = generator.choice(["grow"] * 5 + ["stand", "restart", "swap"])
            if what == "restart" or length == steps:
                restart(row)
            elif what == "swap":  # another text of the same length: the cache must not be believed
                present = obs[row] >= 0
                obs[row, present] = torch.tensor(generator.integers(0, 10, int(present.sum())))
            elif what == "grow":
                obs[row, places + length] = int(generator.integers(0, 10))


@pytest.mark.parametrize("family", ["Mistral, window", "FalconH1"])
def test_a_row_that_stands_still_and_is_not_moved_is_caught(family, monkeypatch):
    """Negative control: without taking the column back a sliding window sees one token fewer."""
    monkeypatch.setattr(GrowingLayer, "release", lambda self, rows: None)
    with pytest.raises(AssertionError):
        test_the_decoder_under_any_use_is_the_model(family)


@pytest.mark.parametrize("family", EACH)
def test_bulk_is_row_by_row_and_its_logprob_the_models(family):
    """Rows leave as they end; the values' hidden states are those that teacher forcing gives."""
    model = build(family)
    prompts = torch.as_tensor(left_pad([[1], [2, 3], [4, 5, 6], [7, 8, 9, 1]] * 3, 4))
    uniforms = torch.rand(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden, limits = {}, dict(max_new_tokens=8, min_new_tokens=2)
    # A token that some rows end on and not all.
    ends = [int((generate(model, prompts, uniforms, token, **limits)[0] == token).sum()) for token in range(10)]
    early = next(token for token, count in enumerate(ends) if 2 <= count <= 10)

    def observe(t, rows, states):
        hidden.update({(row, t): state for row, state in zip(rows.tolist(), states, strict=True)})

    response, logprob = generate(model, prompts, uniforms, early, **limits, observe=observe)
    for row in range(0, 12, 3):
        single, _ = generate(model, prompts[row : row + 1], uniforms[row : row + 1], early, **limits)
        assert single[0].tolist() == response[row].tolist()
    close(family, response_logprob(model, prompts, response, early, min_new_tokens=2, batch_size=5), logprob)
    states = response_forward(model, prompts, response).hidden
    lengths = (response >= 0).sum(dim=1).tolist()
    assert len(hidden) == sum(lengths) and min(lengths) < 8
    for (row, t), state in hidden.items():
        close(family, state, states[row, t])


@pytest.mark.parametrize("family", slow_unless(QUICK.__contains__, [*FAMILIES, *WIDER]))
def test_stepping_is_bulk_and_ppo_trains_it(family):
    start = build(family)
    env = TextVectorEnv(tiny.task(reference=start, temperature=TEMPERATURE), num_envs=4)
    model = copy.deepcopy(start).requires_grad_(True)
    policy = LMPolicy.for_mdp(env.mdp, model)
    stepped, bulk = (way(env, policy, episodes=10, seed=1) for way in (collect, rollout))
    assert torch.equal(stepped.response, bulk.response)
    limit = dict(rtol=0, atol=20 * tolerance(family))
    torch.testing.assert_close(stepped.reward, bulk.reward, **limit)
    torch.testing.assert_close(bulk.logprob, bulk.ref_logprob.to(bulk.logprob), **limit)
    now = policy.evaluate(bulk)
    with torch.no_grad():  # soft caps, scales and what else a model does to its logits are in the policy's numbers
        for row in range(3):
            prompt, response = (x[row][x[row] >= 0] for x in (bulk.prompt, bulk.response))
            logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            expected = (logits / TEMPERATURE).log_softmax(-1)
            known = expected.gather(1, response[:, None]).squeeze(1)
            found = now.logprob[row, : len(response)]
            torch.testing.assert_close(found, known.to(found.dtype), check_dtype=False, **limit)
            found = now.entropy[row, : len(response)]
            entropy = -(expected.exp() * expected).sum(-1)
            torch.testing.assert_close(found, entropy.to(found.dtype), check_dtype=False, **limit)
    held = {name: x.clone() for name, x in start.state_dict().items()}
    agent = PPO(policy, PPOConfig(episodes=10, epochs=1, minibatches=1, learning_rate=1e-2, iterations=2))
    _, metrics = agent.iteration(env)
    assert metrics["logprob_gap_max"] <= limit["atol"] and np.isfinite(list(metrics.values())).all()
    moved = [n for n, x in model.named_parameters() if not torch.equal(x, held[n])]
    assert len(moved) > 0.6 * len(list(model.parameters()))
    assert all(torch.equal(x, held[name]) for name, x in start.state_dict().items())
    again = rollout(env, policy, episodes=10, seed=1)  # by the weights as they are now
    with torch.no_grad():
        assert float((policy.evaluate(again).logprob - again.logprob).abs().max()) <= 10 * limit["atol"]


def test_the_documentation_names_every_family():
    text = (CHECKOUT / "docs" / "models.md").read_text()
    table = text[text.index("## Families") : text.index("## What is refused")]
    named = set(re.findall(r"\w+", table))
    assert not {family.partition(",")[0] for family in [*FAMILIES, *WIDER]} - named
