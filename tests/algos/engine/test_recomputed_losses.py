"""The loss of every policy-gradient algorithm, its gradient and its metrics, computed again a token at a time, where
the policy has moved away from the one that sampled."""

import math
from types import SimpleNamespace

import pytest
import torch

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.policies.language_model import LMPolicy
from tests.algos import batches

PPO = {"gamma": 0.9, "lam": 0.6, "clip": 0.1, "clip_high": 0.25, "value_clip": 0.05, "value_coef": 0.7}
CRITIC = {"gamma": 0.9, "lam": 0.6, "value_coef": 0.7, "entropy_coef": 0.3}
CLIPS = {"clip": 0.1, "clip_high": 0.25}
IN_LOSS = {"kl_coef": 0.3}
CASES = [
    ("reinforce", {"baseline": "constant", "baseline_constant": 0.4, "gamma": 0.9, "entropy_coef": 0.3}),
    ("reinforce", {"baseline": "value", "reward_to_go": True, "gamma": 0.9, "value_coef": 0.7, "entropy_coef": 0.3}),
    ("reinforce", {"baseline": "none", "reward_to_go": True, "whiten_advantage": True, "kl_loss": "full", **IN_LOSS}),
    ("rloo", {"gamma": 0.9, "kl_loss": "k1", **IN_LOSS}),
    ("grpo", {"gamma": 0.9, "kl_loss": "k3", **CLIPS, **IN_LOSS}),
    ("grpo", {"loss_mean": "token", "kl_loss": "full", "clip": 0.1, **IN_LOSS}),
    ("dapo", {"overlong": 0.0, "gamma": 0.9, **CLIPS}),
    ("dr-grpo", {"kl_loss": "k2", "clip": 0.1, **IN_LOSS}),
    ("gspo", {"clip": 0.02, "clip_high": 0.05}),
    ("gspo", {"clip": 0.02, "clip_high": 0.05, "by_token": True}),
    ("cispo", {"clip": 0.1, "clip_high": 0.2, "kl_loss": "k3_ratio", **IN_LOSS}),
    ("reinforce-plus-plus", {"gamma": 0.9, "clip": 0.1}),
    ("reinforce-plus-plus-baseline", {"clip": 0.1, "clip_high": 0.2, **IN_LOSS}),
    ("a2c", CRITIC),
    ("a2c", {**CRITIC, "whiten_advantage": False, "kl_loss": "k2", **IN_LOSS}),
    ("ppo", {**PPO, "entropy_coef": 0.3}),
    ("ppo", {**PPO, "loss_mean": "response", "kl_loss": "k3", **IN_LOSS, "entropy_coef": 0.3}),
    ("ppo", {**PPO, "loss_mean": "sum", "value_clip": None, "clip_high": None}),
    ("ppo-klpen", {**CRITIC, "value_clip": 0.05, "old_kl_coef": 2.0}),
    ("sapo", {"gamma": 0.9, "tau": 2.0, "tau_negative": 30.0}),
    ("sapo", {"loss_mean": "token", "kl_loss": "k1", **IN_LOSS}),
    ("trpo", {"gamma": 0.9}),
    ("trpo", {"kl_loss": "k3", **IN_LOSS}),
    ("bond", {}),
]


def moved(policy):
    """A policy some way from the one that it was."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def number(x):
    return x.item() if isinstance(x, torch.Tensor) else float(x)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def spread(values):
    centre = mean(values)
    return math.sqrt(mean((x - centre) ** 2 for x in values))


def to_go(reward, gamma):
    found = [0.0]
    for r in reversed(reward):
        found.insert(0, r + gamma * found[0])
    return found[:-1]


def gae(reward, value, gamma, lam):
    value, found, later = [*value, 0.0], [], 0.0  # text terminates
    for t in reversed(range(len(reward))):
        later = reward[t] + gamma * value[t + 1] - value[t] + gamma * lam * later
        found.insert(0, later)
    return found


def advantages(name, config, rows):
    """By row and token; and the critic's targets."""
    returns = [to_go(row.reward, config.gamma) for row in rows]
    if name in ("a2c", "ppo", "ppo-klpen"):
        found = [gae(row.reward, row.old_value, config.gamma, config.lam) for row in rows]
        targets = [
            [a + v for a, v in zip(a_row, row.old_value, strict=True)] for a_row, row in zip(found, rows, strict=True)
        ]
        return (whitened(found) if config.whiten_advantage else found), targets
    if name == "reinforce":
        signal = returns if config.reward_to_go else [[g[0]] * len(g) for g in returns]
        constant = config.baseline_constant if config.baseline == "constant" else 0.0
        minus = [row.old_value if config.baseline == "value" else [constant] * len(row.reward) for row in rows]
        found = [[g - b for g, b in zip(*both, strict=False)] for both in zip(signal, minus, strict=True)]
        return (whitened(found) if config.whiten_advantage else found), signal
    if name == "reinforce-plus-plus":
        return whitened(returns), None
    if name == "bond":  # rows come with the weights of their log-probabilities as the rewards
        return [row.reward for row in rows], None
    found = []
    for i, row in enumerate(rows):
        group = [returns[j][0] for j, other in enumerate(rows) if other.group == row.group]
        others = [returns[j][0] for j, other in enumerate(rows) if other.group == row.group and j != i]
        own = returns[i][0]
        if name in ("rloo", "trpo"):
            found.append([own - mean(others)] * len(row.reward))
        elif name in ("dr-grpo", "reinforce-plus-plus-baseline"):
            found.append([own - mean(group)] * len(row.reward))
        else:  # a later token does not earn what came before it
            signal = returns[i] if name == "gspo" and config.by_token else [own] * len(row.reward)
            found.append([(g - mean(group)) / spread(group) for g in signal])
    return (whitened(found) if name == "reinforce-plus-plus-baseline" else found), None


def whitened(found):
    flat = [a for row in found for a in row]
    return [[(a - mean(flat)) / math.sqrt(spread(flat) ** 2 + 1e-8) for a in row] for row in found]


def larger(a, b):
    return a if number(a) > number(b) else b


def surrogate(name, config, row, t, advantage):
    log_ratio = row.now[t] - row.old[t]
    ratio = log_ratio.exp()
    if name in ("reinforce", "rloo", "a2c", "bond"):
        return -advantage * row.now[t]
    if name == "trpo":
        return -advantage * ratio
    if name == "sapo":
        tau = config.tau_negative if advantage < 0 else config.tau
        return -advantage * 4 / tau / (1 + (-tau * (ratio - 1)).exp())
    if name == "ppo-klpen":
        return -advantage * ratio + config.old_kl_coef * (ratio - 1 - log_ratio)
    low, high = 1 - config.clip, 1 + (config.clip if config.clip_high is None else config.clip_high)
    if name == "cispo":
        return -min(max(number(ratio), low), high) * advantage * row.now[t]
    if name == "gspo":
        ratio = (sum(n - o for n, o in zip(row.now, row.old, strict=True)) / len(row.now)).exp()
        if config.by_token:
            ratio = number(ratio) * (row.now[t] - number(row.now[t])).exp()
    clipped = ratio if low < number(ratio) < high else torch.tensor(min(max(number(ratio), low), high)).double()
    return larger(-advantage * ratio, -advantage * clipped)


def divergence(kind, row, t):
    gap = row.now[t] - row.ref[t]
    if kind == "full":
        return (row.full[t].exp() * (row.full[t] - row.ref_full[t])).sum()
    k3 = (-gap).exp() - 1 + gap
    return {"k1": gap, "k2": gap**2 / 2, "k3": k3, "k3_ratio": (row.now[t] - number(row.now[t])).exp() * k3}[kind]


def critic(config, row, t, target):
    error = (row.value[t] - target) ** 2
    clip = getattr(config, "value_clip", None)
    if clip is not None:
        step = row.value[t] - row.old_value[t]
        bounded = step if abs(number(step)) < clip else math.copysign(clip, number(step))
        error = larger(error, (row.old_value[t] + bounded - target) ** 2)
    return error / 2


def recomputed(name, config, rows):
    """The loss, and its metrics."""
    found, targets = advantages(name, config, rows)
    sizes = [len(row.reward) for row in rows]
    by_token = name in ("a2c", "ppo", "ppo-klpen")
    kind = getattr(config, "loss_mean", "token" if by_token else "sum")
    weights = {"response": [1 / n for n in sizes], "token": [1 / mean(sizes)] * len(sizes), "sum": [1.0] * len(sizes)}
    weight = weights["token" if kind == "minibatch" else kind]

    def total(of):
        return mean(
            w * sum(of(row, t, row.number) for t in range(n)) for row, n, w in zip(rows, sizes, weight, strict=True)
        )

    def token_mean(of):
        return number(sum(of(row, t) for row in rows for t in range(len(row.reward)))) / sum(sizes)

    policy = total(lambda row, t, i: surrogate(name, config, row, t, found[i][t]))
    loss, metrics = policy, {} if name == "bond" else {"policy_loss": number(policy)}
    metrics["entropy"] = token_mean(lambda row, t: number(row.entropy[t]))
    if getattr(config, "entropy_coef", 0.0):
        loss = loss - config.entropy_coef * total(lambda row, t, i: row.entropy[t])
    if by_token or getattr(config, "baseline", "") == "value":
        value = total(lambda row, t, i: critic(config, row, t, targets[i][t]))
        loss = loss + config.value_coef * value
        whole = token_mean(lambda row, t: critic(config, row, t, targets[row.number][t]))
        metrics["value_loss"] = number(value) if by_token else whole
    if getattr(config, "kl_loss", None) is not None:
        loss = loss + config.kl_coef * total(lambda row, t, i: divergence(config.kl_loss, row, t))
    if name in ("reinforce", "rloo", "a2c", "trpo", "bond"):
        return loss, metrics
    ratios = [[number((n - o).exp()) for n, o in zip(row.now, row.old, strict=True)] for row in rows]
    metrics["ratio"] = token_mean(lambda row, t: ratios[row.number][t])
    metrics["ratio_max"] = max(map(max, ratios))
    metrics["approx_kl"] = token_mean(lambda row, t: ratios[row.number][t] - 1 - math.log(ratios[row.number][t]))
    if name in ("ppo-klpen", "sapo"):
        return loss, metrics
    if name == "gspo":
        ratios = [[math.exp(mean(map(math.log, row)))] * len(row) for row in ratios]
    low, high = 1 - config.clip, 1 + (config.clip if config.clip_high is None else config.clip_high)
    metrics["clip_fraction"] = token_mean(lambda row, t: not low <= ratios[row.number][t] <= high)
    return loss, metrics


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_a_moved_policys_loss_gradient_and_metrics(name, settings):
    traj, agent = batches.text_batch(), batches.learner(name, **settings)
    agent.reference = LMPolicy.for_mdp(batches.text_env().mdp, batches.text_task().reference)
    old = agent.policy.evaluate(traj)
    with torch.no_grad():
        fixed = agent.prepare(traj, Before(agent.policy, traj))
    moved(agent.policy)
    now = agent.policy.evaluate(traj)
    full, ref_full = now.log_probs(), agent.reference.evaluate(traj).log_probs().detach()
    rows = [
        SimpleNamespace(
            number=i,
            group=int(traj.group[i]),
            reward=traj.reward[i, :n].tolist(),
            old=old.logprob[i, :n].tolist(),
            old_value=old.value[i, :n].tolist(),
            ref=traj.ref_logprob[i, :n].tolist(),
            now=list(now.logprob[i, :n]),
            value=list(now.value[i, :n]),
            entropy=list(now.entropy[i, :n]),
            full=full[i],
            ref_full=ref_full[i],
        )
        for i, n in enumerate(traj.lengths.tolist())
    ]
    expected, figures = recomputed(name, agent.config, rows)
    loss, metrics = agent.loss(traj, now, fixed)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    named = dict(agent.policy.named_parameters())
    found, right = (
        torch.autograd.grad(x, list(named.values()), retain_graph=True, allow_unused=True) for x in (loss, expected)
    )
    for key, a, b in zip(named, found, right, strict=True):
        zero = torch.zeros_like(named[key])
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-5, atol=1e-7, msg=key)
    logged = {key: number(x[0] / x[1]) if isinstance(x, tuple) else number(x) for key, x in metrics.items()}
    assert logged == pytest.approx(figures, rel=1e-6)
    if "clip_fraction" in figures:
        assert 0 < figures["clip_fraction"] < 1 and figures["ratio_max"] > 1.02
