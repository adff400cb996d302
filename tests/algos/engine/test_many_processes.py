"""Law 8: a run on several processes is that of one, for every algorithm; processes are threads here."""

import math
from contextlib import nullcontext
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch

from lm_envs.algos.engine import agent as agents
from lm_envs.algos.engine import batching
from lm_envs.algos.ops import advantages
from lm_envs.algos.registry import load
from lm_envs.env import rollout as rollouts
from lm_envs.env.vector import TextVectorEnv
from lm_envs.processes import group
from tests import tiny
from tests.algos import batches
from tests.many import on_many
from tests.marks import slow_unless

# Five groups over two or four processes are uneven; nothing has the size of a minibatch.
SETTINGS = {"episodes": 20, "group_size": 4, "micro_batch": 3, "max_grad_norm": 0.05, "iterations": 3, "anneal": True}
STEPS = {"ppo": {"kl_stop": 0.5, "minibatches": 3, "epochs": 2}, "grpo": {"minibatches": 3, "epochs": 2}}
QUICK = (("ppo", 4), ("rloo", 2), ("dpo", 2), ("reward-modelling", 4), ("expert-iteration", 2))


@pytest.fixture(autouse=True)
def unlocked(monkeypatch):
    """Before Python 3.12 a cached property holds one lock for all objects, and threads would wait for each other."""
    for held in vars(batching.Before).values():
        if isinstance(held, cached_property):
            monkeypatch.setattr(held, "lock", nullcontext(), raising=False)


def learner(name, **overrides):
    """An agent and its env, which share nothing with another's: a model's forward is not for two threads at once."""
    settings = SETTINGS | STEPS.get(name, {}) | overrides
    if load(name).needs_data:
        settings = {key: value for key, value in settings.items() if key not in ("episodes", "group_size")}
        return batches.learner(name, **settings), None
    settings |= {"kl_target": 0.5} if name != "quark" else {}
    settings |= {"rm_start": "task", "rm_steps": 4, "annotations": 32} if name == "iterated-rlhf" else {}
    if name == "reinforce":
        settings |= {"alpha": 0.5, "demonstrations": 7, "baseline": "running_mean", "whiten_advantage": True}
    task = batches.learned_task() if name == "iterated-rlhf" else tiny.task()
    env = TextVectorEnv(task, 8, group_size=4)
    agent = batches.learner(name, env=env, **settings)
    agent.reference = agent.mdp = None  # the env's
    return agent, env


def run(agent, env):
    metrics = [agent.iteration(env)[1] for _ in range(3)]
    return batches.weights(agent.policy), metrics, agent.checkpoint()[1]


def runs(name, world, **overrides):
    """The weights, metrics and counters of each process."""
    made = [learner(name, **overrides) for _ in range(world)]
    return on_many(world, lambda: run(*made[group.rank()]))


def gap(one, other):
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def differences(a, b):
    """Metrics that differ, those of time aside."""
    times = ("sample_s", "update_s", "tokens_per_second")
    near = {name for name in a if name in b and math.isclose(a[name], b[name], rel_tol=1e-7, abs_tol=1e-8)}
    nan = {name for name in a if a[name] != a[name] and b.get(name) != b.get(name)}
    return sorted((a.keys() | b.keys()) - near - nan - set(times))


@pytest.mark.parametrize(
    ("name", "world"), slow_unless(QUICK.__contains__, [(name, world) for name in batches.LEARNERS for world in (2, 4)])
)
def test_many_processes_are_one(name, world):
    weights, metrics, counters = run(*learner(name))
    for found, their_metrics, their_counters in runs(name, world):
        assert gap(weights, found) < 1e-9
        assert [differences(a, b) for a, b in zip(metrics, their_metrics, strict=True)] == [[]] * 3
        left_out = ("kl_coef", "extra")
        assert {n: v for n, v in counters.items() if n not in left_out} == {
            n: v for n, v in their_counters.items() if n not in left_out
        }


def test_what_was_before_an_update_is_of_all_rows():
    """Twelve rows over two and five processes, in forwards of two rows; each row is evaluated once."""
    traj = batches.text_batch(episodes=12)
    evaluated: list[int] = []

    def read(policy):
        before = batching.Before(policy, traj, 2)
        found = [before.logprob, before.entropy, before.value, before.log_probs()]
        evaluated.append(sum(len(part.logprob) for part in before._evaluated()))
        return found

    policies = [batches.text_policy(TextVectorEnv(tiny.task(), 8)) for _ in range(5)]
    expected = read(policies[0])
    for world in (2, 5):
        evaluated.clear()
        for found in on_many(world, lambda: read(policies[group.rank()])):
            assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(expected, found, strict=True))
        assert sum(evaluated) == 12 and max(evaluated) == -(-12 // world)


def test_gradients_are_sent_once_a_step():
    """What docs/scale.md says is communicated."""

    def do():
        agent, env = made[group.rank()]
        metrics = agent.iteration(env)[1]
        weights = sum(p.numel() for p in agent.policy.parameters() if p.requires_grad)
        return group._sharing.get().summed, weights * metrics["updates"]

    made = [learner("ppo") for _ in range(2)]
    for summed, expected in on_many(2, do):
        assert summed == expected > 0


# Negative controls: each breaks what makes it hold.


def own_mean(monkeypatch):
    """Each process divides by its own units, and the gradients' mean is taken."""
    real = agents.Agent._losses

    def losses(self, name, traj, fixed, unit, loss_of, averages, weight=1.0):
        part, held = batching.select(traj, fixed, batching.share(traj, unit))
        count = group.world()
        with group.alone():
            yield from real(self, name, part, held, unit, loss_of, averages, weight / count)

    monkeypatch.setattr(agents.Agent, "_losses", losses)


def others_episodes(monkeypatch):
    """All processes sample the episodes of the first."""
    names = {"world": group.world, "alone": group.alone, "rank": lambda: 0}
    monkeypatch.setattr(rollouts, "group", SimpleNamespace(**names))


def own_whitening(monkeypatch):
    """Each process whitens by its own rows."""
    real = advantages.whiten

    def whiten(x, mask):
        rows = torch.arange(group.rank(), len(x), group.world())
        found = torch.zeros_like(x)
        found[rows] = real(x[rows], mask[rows])
        return found

    monkeypatch.setattr(advantages, "whiten", whiten)


@pytest.mark.parametrize("broken", [own_mean, others_episodes, own_whitening])
def test_what_breaks_it_is_seen(monkeypatch, broken):
    weights, _, _ = run(*learner("ppo", episodes=16))
    broken(monkeypatch)
    found, _, _ = runs("ppo", 2, episodes=16)[0]
    assert gap(weights, found) > 1e-7
