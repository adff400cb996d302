"""Samplers that differ from the policy: importance weights, what each correction restores on the exact env, and the
metric that reports a mismatch."""

import math

import pytest
import torch

from lm_envs.algos.engine.agent import learn
from lm_envs.algos.engine.exact_gradients import expected_gradient
from lm_envs.algos.ops.losses import sampler_weights
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.mdp import TextMDP
from lm_envs.env.vector import TextVectorEnv
from lm_envs.exact.solver import Exact, cosine, relative_bias
from lm_envs.tasks.enumerable import load
from tests.algos import batches
from tests.marks import slow_unless

KINDS = ("token", "token_mask", "sequence", "sequence_mask", "geometric_mask", "negative_mask")


def test_weights_by_hand():
    """Ratios of 2, 1/4 and 3 in the first row, and of 1/2 and 1/2 in the second; what is masked holds NaN."""
    ratio = torch.tensor([[2.0, 0.25, 3.0], [0.5, 0.5, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    sampler = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.5, math.nan]], dtype=torch.float64)

    def weights(kind, limit):
        found = sampler_weights(kind, sampler + ratio.log(), sampler, mask, limit)
        return pytest.approx(found.flatten().tolist())

    assert weights("token", 2.5) == [2, 0.25, 2.5, 0.5, 0.5, 1]
    assert weights("token_mask", 2.5) == [2, 0, 0, 0.5, 0.5, 1]
    assert weights("sequence", 1.2) == [1.2, 1.2, 1.2, 0.25, 0.25, 1]
    assert weights("sequence_mask", 1.2) == [0, 0, 0, 0.25, 0.25, 1]
    assert weights("sequence_mask", 1.6) == [1.5, 1.5, 1.5, 0.25, 0.25, 1]
    # Geometric means are 1.5^(1/3), 1.145, and 1/2.
    assert weights("geometric_mask", 1.1) == [0, 0, 0, 0, 0, 1]
    assert weights("geometric_mask", 1.2) == [1, 1, 1, 0, 0, 1]
    assert weights("geometric_mask", 2.1) == [1, 1, 1, 1, 1, 1]
    assert weights("negative_mask", 2.1) == [1, 1, 1, 1, 1, 1]
    assert weights("negative_mask", 1.1) == [1, 1, 1, 0, 0, 1]


def test_the_negative_mask_is_for_negative_advantages_alone():
    traj = batches.text_batch()
    agent = batches.learner("rloo", correction="negative_mask", correction_limit=1.5)
    now = agent.policy.evaluate(traj)
    traj.logprob = torch.where(torch.arange(len(traj))[:, None] < 8, now.logprob.detach() + 1.0, now.logprob.detach())
    x = torch.tensor([1.0, -1.0] * 8).double()[:, None].expand(traj.mask.shape)
    found = agent.corrected(x, traj, now)[traj.mask]
    dropped = ((torch.arange(16) < 8) & (torch.arange(16) % 2 == 1))[:, None].expand(traj.mask.shape)[traj.mask]
    assert torch.equal(found, torch.where(dropped, 0.0, x[traj.mask]))


def test_ratios_beyond_the_range_of_their_dtype_cancel():
    """A token that the policy makes e^200 likelier and one e^200 times less likely: a ratio of 1 for the response."""
    sampler = torch.tensor([[-300.0, -1.0]])
    now, mask = sampler + torch.tensor([[200.0, -200.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert sampler_weights("sequence", now, sampler, mask, 2.0).tolist() == [[1.0, 1.0]]
    assert sampler_weights("token", now, sampler, mask, 2.0).tolist() == [[2.0, 0.0]]


def quantized(table, bits=3):
    """Log-probabilities rounded to steps of ``2**-bits`` and normalized, as of weights in few bits."""
    return (torch.round(table * 2**bits) / 2**bits).log_softmax(dim=-1)


SAMPLERS = {
    "temperature 0.7": lambda now, before: (now / 0.7).log_softmax(dim=-1),
    "quantized": lambda now, before: quantized(now, bits=1),
    "stale": lambda now, before: before,
}


def problem(sampler, kl_coef=0.3, horizon=3):
    """A solver, a policy away from the reference, and what it is sampled by instead."""
    exact = Exact(TextMDP(load(tokens=2, horizon=horizon, prompts=2), kl_coef=kl_coef))
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(exact.log_ref.shape, dtype=torch.float64, generator=generator) for _ in range(2)]
    before = (exact.log_ref + 0.7 * noise[0]).log_softmax(dim=-1)
    policy = TabularPolicy(exact, (before + 0.5 * noise[1]).log_softmax(dim=-1))
    return exact, policy, SAMPLERS[sampler](policy.log_probs().detach(), before)


def gradient(name, table_of, batch=1, horizon=3, sampler="stale", **settings):
    """The expected gradient where ``table_of(policy, other)`` is sampled from, and the exact one; of the logits, since
    the critic's loss is not corrected."""
    exact, policy, other = problem(sampler, 0.0 if settings.get("kl_loss") else 0.3, horizon)
    agent = make_agent(name, policy, **{"episodes": 8, "group_size": 1, "kl_coef": 0.3, **settings})
    found = expected_gradient(agent, exact, batch=batch, sampler=table_of(policy, other))
    return {"logits": found["logits"]}, exact.gradient(policy)


ON_POLICY = [
    ("reinforce", 1, {"baseline": "none"}),
    ("reinforce", 1, {"baseline": "none", "kl_loss": "k2"}),
    ("reinforce", 1, {"baseline": "none", "kl_loss": "k3_ratio"}),
    ("a2c", 1, {"lam": 1.0, "whiten_advantage": False}),
    ("ppo", 1, {"lam": 1.0, "whiten_advantage": False}),
    ("rloo", 2, {}),
    ("dr-grpo", 2, {}),
]


@pytest.mark.parametrize("sampler", slow_unless("stale".__eq__, SAMPLERS))
@pytest.mark.parametrize("name, batch, settings", ON_POLICY)
def test_whole_ratios_without_a_limit_restore_the_gradient(sampler, name, batch, settings):
    """That of the algorithm when it samples for itself, the KL penalty in the reward or in the loss included."""
    size = {"batch": batch, "horizon": 4 - batch, "sampler": sampler}
    own = gradient(name, lambda policy, other: None, **size, **settings)[0]
    as_is = gradient(name, lambda policy, other: other, **size, **settings)[0]
    corrections = {"correction": "sequence", "correction_limit": 1e9}
    corrected = gradient(name, lambda policy, other: other, **size, **corrections, **settings)[0]
    assert relative_bias(corrected, own) < 1e-8
    assert relative_bias(as_is, own) > 0.02


COSINES = {  # of RLOO's expected gradient in groups of two, with a limit of 2; docs quote these
    "temperature 0.7": {
        None: 0.9912,
        "token": 0.9963,
        "token_mask": 0.9950,
        "sequence": 0.9997,
        "sequence_mask": 0.9987,
        "geometric_mask": 0.9880,
        "negative_mask": 0.9880,
    },
    "quantized": {
        None: 0.9982,
        "token": 0.9999,
        "token_mask": 0.9999,
        "sequence": 1,
        "sequence_mask": 1,
        "geometric_mask": 0.9984,
        "negative_mask": 0.9984,
    },
    "stale": {
        None: 0.8584,
        "token": 0.9964,
        "token_mask": 0.7211,
        "sequence": 0.9802,
        "sequence_mask": 0.8397,
        "geometric_mask": 0.8280,
        "negative_mask": 0.9070,
    },
}


QUICK = ("stale", None), ("stale", "token")


@pytest.mark.parametrize(
    "sampler, kind",
    slow_unless(QUICK.__contains__, [(sampler, kind) for sampler in SAMPLERS for kind in (None, *KINDS)]),
)
def test_what_each_correction_restores(sampler, kind):
    found, target = gradient("rloo", lambda policy, other: other, 2, sampler=sampler, correction=kind)
    assert cosine(found, target) == pytest.approx(COSINES[sampler][kind], abs=1e-4)


@pytest.mark.parametrize("kind", ["k2", "k3_ratio"])
def test_weighted_kl_terms_are_the_kl_at_the_states_that_were_sampled(kind):
    """With a sampler's weights per token, a term in the loss has the gradient of the KL of each state that the sampler
    visits; without, it has another (DeepSeek-AI 2025, "DeepSeek-V3.2", eq. 7)."""
    exact, policy, other = problem("stale")
    traj, weight = exact.trajectories(other)
    log_p, visits = policy.log_probs(), exact.visits(other) / len(exact.prompts)
    per_state = (log_p.exp() * (log_p - exact.log_ref)).sum(dim=2)
    target = torch.autograd.grad(0.3 * (visits * per_state).sum(), policy.logits)[0]
    for correction, right in (("token", True), (None, False)):
        settings = {"correction": correction, "correction_limit": 1e9, "kl_coef": 0.3, "group_size": 1}
        agent = make_agent("rloo", policy, episodes=8, kl_loss=kind, **settings)
        each = agent.kl_penalty(traj, policy.evaluate(traj))
        found = torch.autograd.grad((weight[:, None] * each).sum(), policy.logits)[0]
        bias = relative_bias({"logits": found}, {"logits": target})
        assert (bias < 1e-8) if right else (bias > 0.02), (correction, bias)


def trained(sampler, **settings):
    """An agent after 30 iterations on a small draw, with its last metrics, and the exact regret of its policy."""
    env = TextVectorEnv(load(tokens=2, horizon=3, prompts=2), 16, group_size=8)
    exact = Exact(env.mdp)
    policy = TabularPolicy(exact)
    policy.sampler = sampler
    settings = {"learning_rate": 0.1, "anneal": False, "max_grad_norm": 1e6, **settings}
    agent = make_agent("rloo", policy, episodes=512, group_size=8, iterations=30, **settings)
    seen = []
    learn(agent, env, callback=lambda _, traj, metrics: seen.append((traj, metrics)))
    return seen, exact.regret(policy)


def test_a_sampler_of_another_temperature_is_reported_and_corrected():
    """Its regret is of the policy, not of the sampler; untouched, learning goes to a policy that suits the sampler."""
    seen, regret = trained(lambda logits: logits / 0.6)
    traj, metrics = seen[0]
    gap = (traj.ref_logprob - traj.logprob)[traj.mask]  # the policy starts as the reference
    assert metrics["sampler_kl"] == pytest.approx(float((gap.exp() - 1 - gap).mean()))
    assert metrics["logprob_gap_max"] == pytest.approx(float(gap.abs().max())) and metrics["sampler_kl"] > 0.01
    corrected = trained(lambda logits: logits / 0.6, correction="sequence", correction_limit=10.0)[1]
    alone, own = trained(None)
    assert alone[0][1]["sampler_kl"] == pytest.approx(0, abs=1e-12)
    assert own < 0.02 and corrected < 0.02 and regret > 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_that_is_the_policy_needs_no_correction(kind):
    ends = []
    for correction in (None, kind):
        env = batches.text_env()
        agent = batches.learner("grpo", env=env, correction=correction, epochs=1, minibatches=1)
        agent.iteration(env)
        ends.append(batches.weights(agent.policy))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-7)


def test_without_the_samplers_log_probabilities_there_is_no_correction():
    traj = batches.text_batch()
    traj.logprob = None
    with pytest.raises(ValueError, match=r"correction needs Trajectories\.logprob"):
        batches.learner("rloo", correction="token").update(traj)
