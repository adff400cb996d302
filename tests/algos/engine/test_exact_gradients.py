"""Law 6: every algorithm's expected gradient, by enumerating all the batches it could sample, against the exact policy
gradient, or against the biased target it is said to have."""

import math

import pytest
import torch

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.exact_gradients import expected_gradient, jackknifed_cosine, sampled_cosine
from lm_envs.algos.ops.losses import k1, k2, k3
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.mdp import TextMDP
from lm_envs.exact.solver import Exact, cosine, relative_bias
from lm_envs.tasks.enumerable import load
from tests.algos.engine.stationary import no_penalty, reverse_state_kl, state_kl, unreported
from tests.marks import slow_unless

BASE = {"episodes": 8, "group_size": 1, "kl_coef": 0.3}


def solver(tokens=2, horizon=3, prompts=2, **options):
    return Exact(TextMDP(load(tokens=tokens, horizon=horizon, prompts=prompts), **options))


def policy_of(exact, seed=1, critic="random"):
    """Away from the reference, with a critic that is exact or wrong."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(exact.log_ref.shape, dtype=torch.float64, generator=generator)
    policy = TabularPolicy(exact, exact.log_ref + 0.7 * noise)
    with torch.no_grad():
        policy.value.normal_(generator=generator)
        if critic == "exact":
            policy.value.copy_(exact.values(policy)[0].flatten())
    return policy


def both(name, exact, *, critic="random", seed=1, batch=1, same_prompt=True, **overrides):
    """The expected gradient and the exact one, of the logits alone: a critic's loss moves the critic."""
    policy = policy_of(exact, seed, critic)
    agent = make_agent(name, policy, **(BASE | overrides))
    return expected_gradient(agent, exact, batch=batch, same_prompt=same_prompt), exact.gradient(policy)


def matches(found, target, tolerance=1e-8):
    return relative_bias(found, target) < tolerance


UNBIASED = [
    ("reinforce", {"baseline": "none"}, {}),
    ("reinforce", {"baseline": "none", "reward_to_go": True}, {}),
    ("reinforce", {"baseline": "constant", "baseline_constant": 1.7}, {}),
    ("reinforce", {"baseline": "running_mean"}, {}),
    ("reinforce", {"baseline": "value", "reward_to_go": True}, {}),
    ("reinforce", {"baseline": "value"}, {}),
    ("a2c", {"lam": 1.0, "whiten_advantage": False}, {}),
    ("a2c", {"lam": 0.95, "whiten_advantage": False}, {"critic": "exact"}),
    ("a2c", {"lam": 0.0, "whiten_advantage": False}, {"critic": "exact"}),
    ("ppo", {"lam": 1.0, "whiten_advantage": False}, {}),
    ("ppo", {"lam": 0.95, "whiten_advantage": False}, {"critic": "exact"}),
]


@pytest.mark.parametrize("number", range(len(UNBIASED)))
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "min_new_tokens": 1, "missing_eos": ("replace", -1.0)}])
def test_the_expected_gradient_is_the_exact_one(number, options):
    name, overrides, how = UNBIASED[number]
    found, exact = both(name, solver(**options), **how, **overrides)
    assert matches(found, exact), relative_bias(found, exact)
    assert float(exact["logits"].norm()) > 0.1


def test_a_running_mean_of_the_past_is_a_baseline_without_bias():
    exact = solver()
    agent = make_agent("reinforce", policy_of(exact), **BASE, baseline="running_mean")
    agent.restore_extra({}, {"running_mean": [0.8, 0.4]})
    assert matches(expected_gradient(agent, exact), exact.gradient(agent.policy))
    assert (agent._mean, agent._weight) == (0.8, 0.4)  # every batch saw the same past


@pytest.mark.parametrize("batch, sizes", [(2, {}), (3, {"horizon": 2})])
@pytest.mark.parametrize(
    "name, overrides",
    [
        ("rloo", {}),
        ("trpo", {}),
        ("reinforce", {"baseline": "leave_one_out"}),
        ("reinforce", {"baseline": "leave_one_out", "reward_to_go": True}),
    ],
)
def test_leave_one_out_is_exact_over_all_groups(batch, sizes, name, overrides):
    exact = solver(**sizes)
    found, target = both(name, exact, batch=batch, **overrides)
    assert matches(found, target), relative_bias(found, target)


@pytest.mark.parametrize("batch, sizes", [(2, {}), (3, {"horizon": 2})])
def test_dr_grpo_is_exact_but_for_the_mean_that_counts_the_episode_itself(batch, sizes):
    """Its stated bias: (K-1)/K of the exact gradient, in the same direction."""
    found, target = both("dr-grpo", solver(**sizes), batch=batch)
    assert matches(found, {"logits": (batch - 1) / batch * target["logits"]})


@pytest.mark.parametrize("batch", slow_unless((2).__eq__, [2, 3]))
def test_a_mean_that_counts_the_episode_itself_shrinks_the_gradient(batch):
    """Its stated bias: (B-1)/B of the exact gradient, over independent prompts; the direction is kept."""
    exact = solver(horizon=2)
    found, target = both("reinforce", exact, batch=batch, same_prompt=False, baseline="batch_mean")
    assert matches(found, {"logits": (batch - 1) / batch * target["logits"]})
    assert relative_bias(found, target) == pytest.approx(1 / batch, abs=1e-8)
    if batch == 2:  # the same when the group is the prompt
        assert matches(both("reinforce", exact, batch=2, baseline="batch_mean")[0], {"logits": target["logits"] / 2})


def test_negative_controls_are_seen():
    """What is wrong is far from 1e-8: a wrong critic with lambda below 1, a wrong coefficient, scores of others."""
    exact = solver()
    for name in ("a2c", "ppo"):
        found, target = both(name, exact, lam=0.0, whiten_advantage=False)
        assert relative_bias(found, target) > 0.1
    found, _ = both("reinforce", exact, baseline="none")
    other = solver(kl_coef=0.2)
    assert relative_bias(found, other.gradient(policy_of(other))) > 1e-2
    with pytest.raises(ValueError, match="27,000 batches of 3 episodes|batches of 3 episodes are more than"):
        both("reinforce", exact, batch=3, same_prompt=False, baseline="batch_mean")


@pytest.mark.slow
def test_whitening_keeps_the_direction_only_nearly():
    """Reported, not hidden: whitened over so small batches the expected gradient turns."""
    exact = solver(horizon=2)
    found, target = both("a2c", exact, critic="exact", batch=3, same_prompt=False, lam=1.0, whiten_advantage=True)
    assert 0.8 < cosine(found, target) < 0.999


GRPO_COSINE = {  # for groups of 2 and of 3; docs quote these
    "std": (0.9624, 0.9729),
    "std and length": (0.9606, 0.9682),
    "std, length and k3": (0.8844, 0.9212),
}
BIASED = {  # by algorithm and settings, the biases that its first step has
    "std": [("grpo", {"kl_loss": None, "loss_mean": "sum"}), ("cispo", {}), ("dapo", {"overlong": 0.0})],
    "std and length": [("grpo", {"kl_loss": None}), ("gspo", {}), ("sapo", {}), ("cispo", {"loss_mean": "response"})],
    "std, length and k3": [("grpo", {}), ("gspo", {"kl_loss": "k3"})],
}


@pytest.mark.parametrize(
    ("biases", "name", "settings", "batch"),
    slow_unless(
        lambda case: case[1] == "grpo" or case[3] == 2,
        [(biases, *case, batch) for biases, cases in BIASED.items() for case in cases for batch in (2, 3)],
    ),
)
def test_grpos_biases_turn_the_gradient(biases, name, settings, batch):
    """Measured, one after the other; at two episodes a group the advantage is only a sign. In large batches a mean over
    all tokens is a sum, scaled. Groups of equal scores are not left out here, where the penalty is in the reward."""
    exact = solver(horizon=2)
    policy = policy_of(exact)
    in_loss = biases.endswith("k3")
    agent = make_agent(name, policy, **BASE | {"group_size": 2} | settings)
    agent.config.informative = False
    found = expected_gradient(agent, solver(horizon=2, kl_coef=0.0) if in_loss else exact, batch=batch)
    assert cosine(found, exact.gradient(policy)) == pytest.approx(GRPO_COSINE[biases][batch - 2], abs=5e-4)


def test_a_mean_over_all_tokens_does_not_turn_the_gradient():
    """Dr. GRPO has no other bias. A mean over each response's tokens turns its gradient."""
    exact = solver(horizon=2)
    for mean, expected in (("sum", 1.0), ("token", 1.0), ("response", 0.9803)):
        found, target = both("dr-grpo", exact, batch=2, loss_mean=mean)
        assert cosine(found, target) == pytest.approx(expected, abs=1e-8 if expected == 1 else 5e-4), mean
    for mean, turned in (("minibatch", False), ("token", False), ("sum", False), ("response", True)):
        found, target = both("ppo", exact, lam=1.0, whiten_advantage=False, loss_mean=mean)
        assert (cosine(found, target) < 1 - 1e-4) == turned, mean


def test_groups_of_equal_scores_weigh_in_the_penalty_alone():
    """Leaving them out changes GRPO's direction where the penalty is in the reward, and not where there is none."""
    for coef, same in ((0.0, True), (0.3, False)):
        exact = solver(horizon=2, kl_coef=coef)
        exact.score = exact.score.round()  # some are equal now
        found = []
        for informative in (False, True):
            agent = make_agent("dapo", policy_of(exact), **BASE | {"group_size": 2, "overlong": 0.0, "kl_coef": coef})
            agent.config.informative = informative
            found.append(expected_gradient(agent, exact, batch=2))
        assert matches(*found) == same and float(found[0]["logits"].norm()) > 0.01


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "min_new_tokens": 1}])
def test_remax_is_exact(options):
    found, target = both("remax", solver(**options))
    assert matches(found, target), relative_bias(found, target)


PLUS_PLUS_COSINE = {"reinforce-plus-plus": (0.8924, 0.9583), "reinforce-plus-plus-baseline": (0.9647, 0.9753)}


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("name", PLUS_PLUS_COSINE)
def test_scaling_over_a_small_batch_turns_the_gradient(name, batch):
    """Measured for batches of one group; in large batches the scale is a constant, see the estimates below."""
    exact = solver(horizon=2)
    found, target = both(name, exact, batch=batch, group_size=2, kl_loss=None)
    assert cosine(found, target) == pytest.approx(PLUS_PLUS_COSINE[name][batch - 2], abs=5e-4)


# Estimated from batches of the algorithm's own size


def estimated(name, exact, policy=None, total=2**14, bandit=False, **overrides):
    policy = policy_of(exact) if policy is None else policy
    policy.bandit = bandit
    agent = make_agent(name, policy, **({"kl_coef": exact.kl_coef, "episodes": 64} | overrides))
    if hasattr(agent, "reference"):
        agent.reference = TabularPolicy(exact)
    return sampled_cosine(agent, exact, episodes=total, bandit=bandit)


@pytest.mark.parametrize("bandit", [False, True])
@pytest.mark.parametrize(
    "name, overrides",
    slow_unless(
        lambda case: case[0] == "rloo",
        [
            ("reinforce", {}),
            ("rloo", {}),
            ("dr-grpo", {}),
            ("a2c", {"lam": 1.0, "whiten_advantage": False}),
            ("ppo", {"lam": 1.0, "whiten_advantage": False}),
            ("ppo-klpen", {"lam": 1.0, "whiten_advantage": False}),
        ],
    ),
)
def test_the_estimate_finds_no_bias_where_there_is_none(name, overrides, bandit):
    found, error = estimated(name, solver(), bandit=bandit, **overrides)
    assert abs(found - 1) < 4 * error < 0.1


def test_the_estimate_finds_the_enumerated_bias():
    exact = solver(horizon=2)
    found, error = estimated("grpo", exact, group_size=2)
    assert abs(found - GRPO_COSINE["std, length and k3"][0]) < 4 * error and found < 1 - 4 * error


def half_way(exact):
    return torch.logaddexp(exact.log_ref, exact.optimal_policy) - math.log(2)


@pytest.mark.parametrize("name", ["expert-iteration", "online-dpo", "quark"])
def test_what_estimates_no_gradient_is_seen(name):
    """Imitation and preferences lead away from it: halfway to the optimum they pull where the score alone does."""
    exact = solver(tokens=3)
    policy = TabularPolicy(exact, half_way(exact))
    found, error = estimated(name, exact, policy, group_size=1 if name == "quark" else 4)
    assert 0 < error < 0.1 and found < 1 - 4 * error


def test_a_coefficient_of_its_own_is_a_bias():
    """Negative control: what is compared is the environment's objective."""
    found, error = estimated("rloo", solver(), kl_coef=1.2)
    assert found < 1 - 4 * error


@pytest.mark.parametrize(
    "kind, agrees", slow_unless(lambda case: case[0] != "k1", [("full", False), ("k1", False), (None, True)])
)
def test_where_the_kl_stands_is_seen(kind, agrees):
    found, error = estimated("rloo", solver(tokens=3), kl_loss=kind, total=2**15)
    assert (abs(found - 1) < 4 * error) == agrees and error < 0.02


def test_the_estimate_leaves_the_agent_as_it_was():
    exact = solver()
    agent = make_agent("reinforce", policy_of(exact), **(BASE | {"baseline": "running_mean"}))
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
    kept = (agent.optimizer, agent.config, agent.extra_state())
    first = sampled_cosine(agent, exact, episodes=256)
    assert (agent.optimizer, agent.config, agent.extra_state()) == kept and agent.iterations_done == 0
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in agent.policy.named_parameters())
    assert sampled_cosine(agent, exact, episodes=256) == first != sampled_cosine(agent, exact, episodes=256, seed=1)


def test_the_jackknifed_cosine_of_known_vectors():
    """Noise that would take a plain cosine of the mean to 0.6 does not move it, and its error is honest."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.zeros(500, dtype=torch.float64).index_fill_(0, torch.tensor([0]), 2.0)
    mean = torch.zeros_like(exact)
    mean[0], mean[1] = 0.8, 0.6
    found, errors, plain = [], [], []
    for _ in range(100):
        rows = mean + 0.5 * torch.randn(100, 500, dtype=torch.float64, generator=generator)
        value, error = jackknifed_cosine(rows, exact)
        found.append(value)
        errors.append(error)
        plain.append(cosine({"x": rows.mean(dim=0)}, {"x": exact}))
    found, errors = torch.tensor(found), torch.tensor(errors)
    assert float(torch.tensor(plain).mean()) < 0.65
    assert abs(float(found.mean()) - 0.8) < 4 * float(found.std()) / 10
    assert 0.7 < float(errors.mean() / found.std()) < 1.4


# At the default size, with the whole enumeration in one batch


@pytest.fixture(scope="module")
def default():
    return Exact(TextMDP(load()))


@pytest.mark.parametrize("name", ["reinforce", "a2c", "ppo"])
def test_all_sequences_of_the_default_environment(name, default):
    """15,624 episodes in one batch, each advantage times its probability: the sum is the expectation."""
    policy = policy_of(default, critic="exact")
    plain = {"baseline": "value"} if name == "reinforce" else {"whiten_advantage": False, "value_coef": 1e-300}
    agent = make_agent(name, policy, **BASE, **plain)
    traj, weight = default.trajectories(policy.log_probs().detach())
    with torch.no_grad():
        fixed = agent.prepare(traj, Before(policy, traj))
    count = traj.mask.sum() if agent.unit == "token" else len(traj)
    fixed["advantage"] = fixed["advantage"] * weight.unsqueeze(1) * count
    loss = agent.loss(traj, policy.evaluate(traj), fixed)[0]
    found = {"logits": -torch.autograd.grad(loss, policy.logits)[0]}
    assert matches(found, default.gradient(policy))


# KL estimators


class KL:
    """The pieces of one enumeration: every episode, its probability, and the gradient of any expectation."""

    def __init__(self, table=None, **options):
        self.exact = solver(tokens=3, prompts=3, **options)
        self.policy = policy_of(self.exact) if table is None else TabularPolicy(self.exact, table(self.exact))
        self.traj, self.weight = self.exact.trajectories(self.policy.log_probs().detach())
        self.now = self.policy.evaluate(self.traj)
        self.visits = self.exact.visits(self.policy.log_probs().detach()) / len(self.exact.prompts)

    def gradient(self, scalar):
        return {"logits": torch.autograd.grad(scalar, self.policy.logits, retain_graph=True)[0]}

    def in_loss(self, per_token):
        """Expected gradient of a loss term ``(B, T)``, the samples being what they are."""
        return self.gradient((self.weight.unsqueeze(1) * torch.where(self.traj.mask, per_token, 0.0)).sum())

    def estimate(self, kind):
        return kind(self.now.logprob, self.traj.ref_logprob, self.traj.mask)

    def whole_kl(self):
        return self.gradient(self.exact.kl(self.policy))

    def per_state(self, reverse=False):
        """``sum_s d(s) grad KL_s``, the visits d held fixed."""
        log_p, log_q = self.policy.log_probs(), self.exact.log_ref
        a, b = (log_q, log_p) if reverse else (log_p, log_q)
        terms = torch.where(log_q > -torch.inf, a.exp() * (a - b), torch.zeros_like(a))
        return self.gradient((self.visits * terms.sum(dim=2)).sum())


@pytest.fixture(scope="module")
def kl():
    return KL()


def test_k1_in_the_loss_has_no_expected_gradient(kl):
    found = kl.in_loss(kl.estimate(k1))
    assert float(found["logits"].norm()) < 1e-12 * float(kl.whole_kl()["logits"].norm()) + 1e-15


def test_k2_per_token_is_the_kl_of_each_state(kl):
    found = kl.in_loss(kl.estimate(k2))
    assert matches(found, kl.per_state())
    assert relative_bias(found, kl.whole_kl()) > 0.05  # it omits what an early token does to later KL


def test_ratio_times_k3_and_the_sum_over_the_vocabulary_are_the_same(kl):
    ratio = (kl.now.logprob - kl.now.logprob.detach()).exp()
    assert matches(kl.in_loss(ratio * kl.estimate(k3)), kl.per_state())
    log_p = kl.now.log_probs()
    rows = kl.exact.log_ref[kl.traj.group.unsqueeze(1), kl.exact.tree.states(kl.traj.response)[:, :-1] % 13]
    assert matches(kl.in_loss((log_p.exp() * (log_p - rows)).sum(dim=2)), kl.per_state())


def test_k2_of_the_whole_sequence_is_exact(kl):
    whole = kl.estimate(k1).sum(dim=1)
    found = kl.gradient((kl.weight * 0.5 * whole**2).sum())
    assert matches(found, kl.whole_kl())


def test_k3_per_token_pulls_along_the_other_kl(kl):
    found = kl.in_loss(kl.estimate(k3))
    assert matches(found, kl.per_state(reverse=True))
    assert relative_bias(found, kl.per_state()) > 0.1 and relative_bias(found, kl.whole_kl()) > 0.1


def to_go(reward):
    return reward.flip(1).cumsum(dim=1).flip(1)


def test_k1_in_the_reward_is_exact_and_k3_there_is_not(kl):
    def as_reward(estimate):
        return kl.in_loss(to_go(estimate.detach()) * kl.now.logprob)

    assert matches(as_reward(kl.estimate(k1)), kl.whole_kl())
    found = as_reward(kl.estimate(k3))
    assert relative_bias(found, kl.whole_kl()) > 0.1
    # Whole sequences: the gradient of E[k3] = KL has two parts, of which a reward gives one; the other is that of
    # KL(ref || pi).
    whole = kl.estimate(k1).sum(dim=1)
    score = kl.gradient((kl.weight * (torch.expm1(-whole) + whole).detach() * kl.now.logprob.sum(dim=1)).sum())
    log_p, log_q = kl.exact.sequences(kl.policy), kl.exact.sequences(kl.exact.log_ref)
    other = kl.gradient((log_q.exp() * (log_q - log_p)).sum(dim=1).mean())
    assert matches(score, {"logits": kl.whole_kl()["logits"] - other["logits"]})


def test_as_values_k1_and_k3_are_unbiased_and_k2_is_not(kl):
    exact = float(kl.exact.kl(kl.policy.log_probs().detach()))

    def value(kind):
        return float((kl.weight.unsqueeze(1) * kl.estimate(kind).detach()).sum())

    assert value(k1) == pytest.approx(exact, abs=1e-12) and value(k3) == pytest.approx(exact, abs=1e-12)
    assert abs(value(k2) - exact) > 1e-3


# Where the penalties come to rest


def field(kl, penalty):
    """The expected ascent direction: the score's exact gradient less beta times that of a penalty in the loss."""
    score = kl.gradient(kl.exact.reward(kl.policy))["logits"]
    return score - kl.exact.kl_coef * penalty["logits"]


REST = {
    "k2": (state_kl, lambda kl: kl.in_loss(kl.estimate(k2))),
    "k3": (reverse_state_kl, lambda kl: kl.in_loss(kl.estimate(k3))),
    "k1 in the reward": (
        lambda exact: exact.optimal_policy,
        lambda kl: kl.in_loss(to_go(kl.estimate(k1).detach()) * kl.now.logprob),
    ),
}


@pytest.mark.parametrize("options", [{}, {"min_new_tokens": 1}])
@pytest.mark.parametrize("name", REST)
def test_the_estimators_rest_where_it_is_said(name, options):
    at, penalty = REST[name]
    rest = KL(at, **options)
    assert float(field(rest, penalty(rest)).norm()) < 1e-10
    for other in REST.keys() - {name}:
        assert float(field(rest, REST[other][1](rest)).norm()) > 1e-3


@pytest.mark.parametrize("coef", [0.3, 0.1])
def test_an_unreported_penalty_with_an_entropy_bonus_rests_where_it_is_said(coef):
    rest = KL(lambda exact: unreported(exact, coef))
    traj, beta = rest.traj, rest.exact.kl_coef
    paid = beta * traj.ref_logprob
    paid[torch.arange(len(traj)), traj.lengths - 1] += traj.score
    bonus = rest.in_loss(rest.now.entropy)["logits"]
    total = rest.in_loss(to_go(paid) * rest.now.logprob)["logits"] + coef * bonus
    assert float(total.norm()) < 1e-10
    assert float((total - 0.5 * coef * bonus).norm()) > 1e-3


def test_without_any_bonus_they_rest_at_one_response():
    exact = solver(tokens=3, prompts=3)
    for table, value in ((no_penalty(exact), 0.0), (unreported(exact), exact.kl_coef)):
        p = exact.sequences(table).exp()
        best = (exact.score + value * exact.sequences(exact.log_ref)).argmax(dim=1)
        torch.testing.assert_close(p.gather(1, best.unsqueeze(1)), torch.ones(3, 1, dtype=torch.float64))


REGRET = {  # of the default environment; docs quote these
    "k1 in the reward": (lambda exact: exact.optimal_policy, 0.0),
    "per-state KL in the loss": (state_kl, 0.0638),
    "k3 in the loss": (reverse_state_kl, 0.1415),
    "k1 in the loss": (no_penalty, 0.4613),
    "not reported": (unreported, 0.2512),
    "not reported, entropy bonus beta": (lambda exact: unreported(exact, exact.kl_coef), 0.0787),
}


@pytest.mark.parametrize("name", REGRET)
def test_the_regret_that_is_stated(name, default):
    table, regret = REGRET[name]
    assert default.regret(table(default)) == pytest.approx(regret, abs=1e-4)
    assert default.frontier_gap(table(default)) > -1e-9
