"""Every registered algorithm learns from what it should, reads every setting it has, and refuses nonsense."""

from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest
import torch

from lm_envs.algos import registry
from lm_envs.algos.engine.agent import Agent, learn
from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.comparisons import by_group, preferences
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.expert_iteration import best_of_groups
from lm_envs.env.rollout import rollout
from lm_envs.trajectories import demonstrations
from tests import tiny
from tests.algos import batches
from tests.marks import slow_unless


@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_registered_names_are_the_classes_own(name):
    found = registry.load(name)
    assert name in registry.WRAPPERS or found.name == name
    assert found.__doc__


@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_docs_have_a_line_and_advice_for_each(name):
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    before, advice = text.split("\n## Advice\n")
    shown = {"best-of-n": "best-of-<n>"}.get(name, name)
    assert f"\n| `{shown}` |" in before
    rows = [line.split("|")[1] for line in advice.splitlines() if line.startswith("| `")]
    assert any(f"`{shown}`" in names for names in rows)


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match="no algorithm 'pp0': .*ppo"):
        registry.load("pp0")
    with pytest.raises(ValueError, match="there are .*a2c"):
        registry.load("zzzzzz")
    with pytest.raises(ValueError, match="no setting 'learnin_rate'.*learning_rate"):
        registry.make_config("ppo", learnin_rate=1.0)
    with pytest.raises(ValueError, match="needs no training"):
        registry.make_config("best-of-n")
    with pytest.raises(ValueError, match="takes no data"):
        registry.make_agent("ppo", batches.text_policy(batches.text_env()), data=batches.ranked())


@pytest.mark.parametrize("name", [name for name in batches.LEARNERS if registry.load(name).needs_data])
def test_learning_from_data_needs_data(name):
    with pytest.raises(ValueError, match="pass data"):
        policy = batches.reward_policy() if name == "reward-modelling" else batches.text_policy(batches.text_env())
        registry.make_agent(name, policy)


def test_sft_finds_the_demonstrations_of_a_task():
    task = tiny.task(demonstrations=batches.texts())
    env = batches.text_env()
    agent = registry.make_agent("sft", batches.text_policy(env), task)
    assert agent.data.prompt.shape[1] == task.prompt_length
    assert len(agent.data) == sum(len(text) > task.prompt_length for text in task.demonstrations)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a2c", {"epochs": 2}, "on-policy"),
        ("a2c", {"lam": 1.5}, "lam"),
        ("a2c", {"critic": "r"}, "critic"),
        ("a2c", {"critic": "q", "value_from": "reward_model"}, "value_from='policy'"),
        ("reinforce", {"steps": 10}, "whole episodes"),
        ("reinforce", {"baseline": "median"}, "batch_mean"),
        ("reinforce", {"baseline_decay": 1.0}, "baseline_decay"),
        ("reinforce", {"alpha": -1.0}, "alpha"),
        ("ppo-ptx", {"demonstrations": 0}, "demonstrations"),
        ("rloo", {"epochs": 2}, "on-policy"),
        ("rloo", {"steps": 8}, "whole episodes"),
        ("grpo", {"clip": 0.0}, "clip"),
        ("iterated-rlhf", {"rounds": 0}, "rounds"),
        ("iterated-rlhf", {"annotations": 1}, "annotations"),
        ("iterated-rlhf", {"flip": 2.0}, "flip"),
        ("iterated-rlhf", {"rm_start": "sft"}, "rm_start"),
        ("dpo", {"beta": 0.0}, "beta"),
        ("dpo", {"pairs": 0}, "pairs"),
        ("dpo", {"flip": -0.1}, "flip"),
        ("online-dpo", {"group_size": 1}, "at least 2"),
        ("online-dpo", {"steps": 8}, "whole episodes"),
        ("quark", {"quantiles": 1}, "quantiles"),
        ("quark", {"pool": 0}, "pool"),
        ("quark", {"steps": 8}, "whole episodes"),
        ("reward-modelling", {"ranking": "best"}, "ranking"),
        ("dr-grpo", {"steps": 8}, "whole episodes"),
        ("ppo-klpen", {"old_kl_coef": -1.0}, "old_kl_coef"),
        ("ppo-klpen", {"old_kl_target": 0.0}, "old_kl_target"),
        ("ppo", {"clip": 0.0}, "clip"),
        ("ppo", {"value_clip": -1.0}, "value_clip"),
        ("ppo", {"lam": -0.1}, "lam"),
        ("ppo", {"learning_rate": 0.0}, "learning_rate"),
        ("ppo", {"micro_batch": 0}, "micro_batch"),
        ("ppo", {"gamma": 1.1}, "gamma"),
        ("ppo", {"episodes": None}, "episodes or steps"),
        ("ppo", {"episodes": 10, "group_size": 4}, "multiple of group_size"),
        ("expert-iteration", {"keep": 9}, "keep"),
        ("expert-iteration", {"steps": 9}, "whole episodes"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        registry.make_config(name, **settings)


# What each algorithm learns

COUSINS = (
    "cispo",
    "gspo",
    "sapo",
    "dr-grpo",
    "reinforce-plus-plus",
    "reinforce-plus-plus-baseline",
)  # of GRPO and DAPO


def mean_score(policy, kind):
    env = batches.text_env(kind, 1)
    return float(rollout(env, policy, episodes=128, first_episode=10_000, seed=9).score.mean())


QUICK = ("quark", "expert-iteration", "online-dpo", "reinforce", "grpo", "ppo", "iterated-rlhf")  # one per family


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_unless(
        lambda case: case[0] in QUICK if case[1] == "mdp" else case[0] in ("reinforce", "ppo"),
        product(batches.REWARDED, ("mdp", "bandit")),
    ),
)
def test_every_sampling_algorithm_raises_the_score_on_text(name, kind):
    env = batches.env_for(name, kind)
    # PPO takes eight steps per iteration; Quark first has to learn what its tokens mean.
    iterations = {"quark": 24}.get(name, 5 if name.startswith("ppo") else 12)
    agent = batches.learner(name, kind, env=env, episodes=32, iterations=iterations, learning_rate=2e-2)
    start = mean_score(agent.policy, kind)
    learn(agent, env)
    assert mean_score(agent.policy, kind) > start + 0.5


def test_the_kl_penalty_holds_the_policy_near_the_reference():
    """Negative control of the test above: where the penalty is all that counts, nothing else is learned."""
    found = {}
    for coef in (0.0, 50.0):
        env = batches.text_env()
        agent = batches.learner("reinforce", env=env, episodes=32, iterations=8, learning_rate=2e-2, kl_coef=coef)
        learn(agent, env)
        found[coef] = agent.iteration(env)[1]["kl"]
    assert found[50.0] < 0.5 * found[0.0]


def test_sft_lowers_the_loss_of_its_demonstrations():
    agent = batches.learner("sft", iterations=30, learning_rate=1e-2)
    first = agent.iteration()[1]["nll"]
    learn(agent)
    last = float(-agent.policy.evaluate(agent.data).logprob.detach()[agent.data.mask].mean())
    assert last < 0.6 * first
    assert agent.tokens_done == agent.episodes_done == agent.reward_calls == 0  # nothing was sampled


def test_reward_modelling_learns_the_order_and_starts_at_log_2():
    agent = batches.learner("reward-modelling", iterations=40, learning_rate=1e-2)
    with torch.no_grad():
        agent.policy.model.score.weight.zero_()
    first = agent.iteration()[1]
    assert first["ranking_loss"] == pytest.approx(0.6931, abs=1e-3)
    metrics = [agent.iteration()[1] for _ in range(39)]
    assert metrics[-1]["accuracy"] == 1.0 and metrics[-1]["ranking_loss"] < 0.1


# REINFORCE's baselines


def prepared(traj, policy, **settings):
    agent = registry.make_agent("reinforce", policy, **(batches.SMALL | settings))
    with torch.no_grad():
        return agent.prepare(traj, Before(policy, traj)), agent


@pytest.fixture(scope="module")
def batch():
    env = batches.text_env()
    policy = batches.text_policy(env)
    return rollout(env, policy, episodes=8, seed=2), policy


def test_the_baselines_by_hand(batch):
    traj, policy = batch
    returns = traj.reward.nan_to_num(0).where(traj.mask, torch.zeros(()).double()).sum(dim=1)
    by_four = returns.reshape(2, 4)
    others = ((by_four.sum(1, keepdim=True) - by_four) / 3).reshape(-1)
    value = policy.evaluate(traj).value.detach()
    for settings, expected in [
        ({"baseline": "none"}, returns),
        ({"baseline": "constant", "baseline_constant": 0.3}, returns - 0.3),
        ({"baseline": "batch_mean"}, returns - returns.mean()),
        ({"baseline": "leave_one_out"}, returns - others),
        ({"baseline": "value"}, returns - value[:, 0]),
    ]:
        fixed, _ = prepared(traj, policy, **settings)
        torch.testing.assert_close(fixed["advantage"][:, 0], expected)
        if settings["baseline"] != "value":
            torch.testing.assert_close(fixed["advantage"], expected[:, None] * traj.mask)
    assert traj.group.tolist() == [0] * 4 + [1] * 4


def test_the_running_mean_is_of_past_batches_only(batch):
    traj, policy = batch
    fixed, agent = prepared(traj, policy, baseline="running_mean", baseline_decay=0.5)
    none, _ = prepared(traj, policy, baseline="none")
    assert torch.equal(fixed["advantage"], none["advantage"])  # there is no past yet
    again = agent.prepare(traj, Before(policy, traj))["advantage"]
    mean = none["advantage"].sum() / traj.mask.sum()
    torch.testing.assert_close(again[traj.mask], (none["advantage"] - mean)[traj.mask])


def test_reward_to_go_leaves_out_what_came_before(batch):
    traj, policy = batch
    fixed, _ = prepared(traj, policy, baseline="none", reward_to_go=True)
    last = traj.lengths - 1
    rows = torch.arange(len(traj))
    torch.testing.assert_close(fixed["advantage"][rows, last], traj.reward[rows, last])
    torch.testing.assert_close(fixed["advantage"][:, 0], traj.reward.where(traj.mask, 0.0).sum(dim=1))


def test_leave_one_out_without_groups_is_refused():
    env = batches.text_env(group_size=1)
    agent = batches.learner("reinforce", env=env, group_size=1)
    with pytest.raises(ValueError, match="two episodes per prompt"):
        agent.iteration(env)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "value"])
def test_the_expected_gradient_is_that_of_the_expected_return(baseline):
    """By enumeration: a policy over three actions, one step, every pair of episodes with its probability."""
    torch.manual_seed(0)
    logits, reward = torch.randn(3).double().requires_grad_(), torch.tensor([1.0, -2.0, 0.5]).double()
    exact = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)[0]
    p = logits.softmax(0).detach()
    total = torch.zeros(3).double()
    for i in range(3):
        for j in range(3):
            pair = reward[[i, j]]
            subtract = {"none": torch.zeros(2), "leave_one_out": pair.flip(0), "value": torch.full((2,), 0.7)}[baseline]
            loss = -((pair - subtract) * logits.log_softmax(0)[[i, j]]).mean()
            total += p[i] * p[j] * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(-total, exact)


# Expert iteration


def test_what_expert_iteration_keeps(monkeypatch):
    """By prompt, overall and blindly: as many rows each time; the control does not look at the scores."""
    traj, seen = batches.text_batch(), []
    traj.score = torch.tensor([0.0, 9, 8, 1, 2, 3, 7, 4, 5, 5, 5, 5, 6, 1, 0, 0], dtype=torch.float64)
    plain = Agent.update
    monkeypatch.setattr(Agent, "update", lambda self, rows: seen.append(rows.score.tolist()) or plain(self, rows))
    for settings, kept in (
        ({"keep_by": "prompt", "keep": 1}, [9, 7, 5, 6]),
        ({"keep_by": "prompt", "keep": 2}, [9, 8, 7, 4, 5, 5, 6, 1]),
        ({"keep_by": "overall", "keep": 1}, [9, 8, 7, 6]),
        ({"keep_by": "random", "keep": 2}, [0, 9, 2, 3, 5, 5, 6, 1]),
    ):
        metrics = batches.learner("expert-iteration", **settings).update(traj)
        assert seen.pop() == kept and metrics["kept_score"] == sum(kept) / len(kept)
        assert metrics["sampled_score"] == 61 / 16


def test_best_of_groups_by_hand():
    value = torch.tensor([1.0, 5.0, 2.0, 7.0, 7.0, 0.0])
    group = torch.tensor([9, 2, 9, 9, 2, 2])
    assert best_of_groups(value, group, 1).tolist() == [3, 4]
    assert best_of_groups(value, group, 2).tolist() == [1, 2, 3, 4]
    assert best_of_groups(torch.tensor([3.0, 3.0]), torch.tensor([0, 0]), 1).tolist() == [0]  # ties: the earlier


def test_expert_iteration_imitates_the_best_alone(monkeypatch):
    agent, traj = batches.learner("expert-iteration"), batches.text_batch()
    seen = []
    plain = type(agent).__mro__[1].update
    monkeypatch.setattr(type(agent).__mro__[1], "update", lambda self, t: seen.append(t) or plain(self, t))
    metrics = agent.update(traj)
    assert len(seen[0]) == 4
    assert torch.equal(seen[0].score, traj.score.reshape(4, 4).max(dim=1).values)
    assert metrics["kept_score"] == pytest.approx(float(seen[0].score.mean()))


def test_restart_begins_every_iteration_at_the_first_weights():
    traj = batches.text_batch()
    once, twice, on = (batches.learner("expert-iteration", restart=r, anneal=False) for r in (True, True, False))
    once.update(traj)
    for agent in (twice, on):
        agent.update(traj)
        agent.update(traj)
    assert batches.same(batches.weights(once.policy), batches.weights(twice.policy))
    assert not batches.same(batches.weights(on.policy), batches.weights(twice.policy))


def test_expert_iteration_on_control_groups_episodes_in_a_row():
    traj, policy = batches.control_batch(episodes=8)
    agent = registry.make_agent("expert-iteration", policy, episodes=8, group_size=4)
    metrics = agent.update(traj)
    returns = traj.lengths.reshape(2, 4).double()
    assert metrics["kept_score"] == float(returns.max(dim=1).values.mean())


# Data


def test_demonstrations_by_hand():
    traj = demonstrations([[5, 6, 7, 0], [5, 6, 1, 2, 3, 4]], 2, 3, [0, 0])
    assert traj.prompt.tolist() == [[5, 6], [5, 6]]
    assert traj.response.tolist() == [[7, 0, -1], [1, 2, 3]]
    assert traj.obs.tolist() == [[5, 6, 7, 0, -1], [5, 6, 1, 2, 3]]
    assert traj.mask.tolist() == [[True, True, False], [True, True, True]]
    assert traj.reward is None
    with pytest.raises(ValueError, match="text 1 has 2 tokens"):
        demonstrations([[1, 2, 3], [1, 2]], 2, 3)


def test_preferences_are_checked():
    with pytest.raises(ValueError, match="one rank per text"):
        preferences([[[1, 2, 3], [1, 2, 4]]], [[0]], 2, 3)
    equal = preferences([[[1, 2, 3], [1, 2, 4]], [[1, 2, 3], [1, 2, 4]]], [[0, 1], [0, 0]], 2, 3)
    with pytest.raises(ValueError, match="group 1 has no two texts of different rank"):
        registry.make_agent("reward-modelling", batches.reward_policy(), data=equal)


def test_by_group_by_hand():
    table, present = by_group(torch.tensor([1, 2, 3]), torch.tensor([4, 1, 4]), -1)
    assert table.tolist() == [[2, -1], [1, 3]]
    assert present.tolist() == [[True, False], [True, True]]


def test_a_group_drawn_twice_in_a_batch_stays_two_groups():
    agent = batches.learner("reward-modelling", episodes=9)  # there are six
    traj = next(agent.batches())
    assert len(torch.unique(traj.group)) == 9


# No dead knobs: every setting, changed, changes the weights that come out (or the sampling, or when it stops)

BASE = {
    "ppo": {"epochs": 1},  # two minibatches: the second sees a ratio that is not 1
    **dict.fromkeys((*COUSINS, "grpo", "dapo", "ppo-ptx"), {"epochs": 2}),
    "ppo-klpen": {"epochs": 2},
    "distillation": {"as_reward": True},
    "iterated-rlhf": {"epochs": 2, "iterations": 2, "annotations": 64, "held_out": 16, "rm_steps": 8},
    "expert-iteration": {"epochs": 1},
}
# What a setting needs around it to matter: (settings of both runs, the change).
CHANGES = {
    "learning_rate": ({}, 0.02),
    "anneal": ({}, False),
    "iterations": ({}, 3),
    "episodes": ({}, {"default": 12, "reward-modelling": 4, "sft": 6, "dpo": 4}),
    "steps": (None, None),
    "group_size": ({}, 2),
    "epochs": ({}, 3),
    "minibatches": ({}, 3),
    "micro_batch": (None, None),
    "draws": (None, None),
    "informative": ({"group_size": 2}, {"default": True, "dapo": False}),
    "overlong": ({}, 3.0),
    "overlong_share": ({"overlong": 1.0}, 0.8),
    "clip_high": ({}, {"default": 0.001, "gspo": 0.5}),
    "loss_mean": ({}, {"default": "response", "grpo": "token", "gspo": "token", "sapo": "token"}),
    "by_token": ({}, True),
    "tau": ({}, 30.0),
    "tau_negative": ({}, 30.0),
    "max_grad_norm": ({}, 0.01),
    "adam_eps": ({}, 0.1),
    "gamma": ({}, 0.5),
    "kl_coef": ({}, {"default": 1.0, "vbon": 0.5}),
    "kl_target": ({"kl_horizon": 10.0}, 0.1),
    "kl_horizon": ({"kl_target": 0.1}, 10.0),
    "seed": ({}, 1),
    "baseline": ({}, "none"),
    "baseline_constant": ({"baseline": "constant"}, 1.0),
    "baseline_decay": ({"baseline": "running_mean"}, 0.1),
    "reward_to_go": ({}, True),
    "whiten_advantage": ({}, {"default": False, "reinforce": True}),
    "value_coef": ({"baseline": "value"}, 5.0),
    "entropy_coef": ({}, 1.0),
    "lam": ({}, 0.2),
    "clip": ({}, {"default": 0.001, "gspo": 0.5}),
    "value_clip": ({}, 0.001),
    "kl_stop": ({}, 1e-6),
    "correction": (None, None),
    "correction_limit": (None, None),
    "kl_loss": ({}, {"default": "k2", "reinforce-plus-plus-baseline": "k3"}),
    "critic": ({}, "q"),
    "value_from": ({"ptx_coef": 0.0}, "reward_model"),
    "old_kl_coef": ({}, 0.1),
    "old_kl_target": ({}, None),
    "alpha": ({}, 0.5),
    "demonstrations": ({"alpha": 0.5}, 7),
    "ptx_coef": ({}, 0.1),
    "keep": ({}, 2),
    "keep_by": ({}, "random"),
    "quantiles": ({}, 3),
    "best_only": ({}, True),
    "pool": ({"learn_episodes": 6}, 10),
    "learn_episodes": ({}, 3),
    "loss": ({}, "ipo"),
    "beta": ({}, 0.5),
    "length_normalized": ({}, True),
    "flip_rate": ({"loss": "robust"}, 0.4),
    "target_margin": ({"loss": "simpo"}, 3.0),
    "odds_weight": ({"loss": "orpo"}, 2.0),
    "wanted_weight": ({"loss": "kto"}, 3.0),
    "unwanted_weight": ({"loss": "kto"}, 3.0),
    "ranking": ({}, "plackett-luce"),
    "pairs": ({"flip": 0.25}, 20),
    "flip": ({"pairs": 20}, 0.9),
    "rounds": ({}, 1),
    "annotations": ({}, 32),
    "held_out": ({}, 8),
    "rm_start": ({}, "task"),
    "rm_steps": ({}, 4),
    "rm_batch": ({}, 16),
    "rm_learning_rate": ({}, 0.001),
    "rm_weight_decay": ({}, 0.5),
    "restart": ({}, True),
    "optimism": ({}, 0.5),
    "teacher": (None, None),
    "as_reward": ({}, False),
    "forward_weight": ({}, 0.9),
    "anchor_rate": ({}, 0.5),
    "anchor_kl_coef": ({}, 5.0),
    "old_kl_limit": ({}, 0.1),
    "cg_steps": ({}, 2),
    "damping": ({}, 10.0),
    "backtracks": (None, None),
    "n": ({}, 3),
    "reference_samples": ({}, 7),
}
# Settings which an algorithm has from the engine and which can not matter to it, with the reason.
WITHOUT_EFFECT = {
    "a2c": {"epochs": "one step per batch", "minibatches": "one step per batch"},
    "rloo": {"epochs": "one step per batch", "minibatches": "one step per batch"},
    "bond": dict.fromkeys(("gamma", "kl_coef", "kl_target", "kl_horizon"), "compares scores, before the penalty"),
    "trpo": dict.fromkeys(("learning_rate", "adam_eps", "max_grad_norm"), "for Adam")
    | dict.fromkeys(("epochs", "minibatches"), "one step per batch"),
    "remax": {"epochs": "one step per batch", "minibatches": "one step per batch"},
    "vbon": {"epochs": "one step per batch", "minibatches": "one step per batch"},
    "expert-iteration": {
        "gamma": "ranks by the score",
        "kl_coef": "ranks by the score, which is before the penalty",
        "kl_target": "as kl_coef",
        "kl_horizon": "as kl_coef",
    },
    "quark": {"gamma": "sorts by the score"},
    "iterated-rlhf": {"informative": "its reward model never scores two texts alike"},
    "online-dpo": dict.fromkeys(
        ("gamma", "kl_coef", "kl_target", "kl_horizon"), "compares scores; the penalty is beta's"
    )
    | dict.fromkeys(("wanted_weight", "unwanted_weight"), "for kto, which learns from labels"),
    "distillation": dict.fromkeys(("kl_coef", "kl_target", "kl_horizon"), "no reward, no penalty")
    | {"group_size": "prompts are compared with others"},
    "xpo": dict.fromkeys(("gamma", "kl_coef", "kl_target", "kl_horizon"), "compares scores; the penalty is beta's")
    | dict.fromkeys(("wanted_weight", "unwanted_weight"), "for kto, which learns from labels")
    | dict.fromkeys(("target_margin", "odds_weight"), "for losses without a reference"),
    **{
        name: dict.fromkeys(("gamma", "kl_coef", "kl_target", "kl_horizon", "group_size"), "nothing is sampled")
        for name in batches.LEARNERS
        if registry.load(name).needs_data
    },
}


def end(name, settings):
    few = 6 if registry.load(name).unit == "group" and registry.load(name).needs_data else 8
    settings = {"learning_rate": 0.01, "iterations": 4, "episodes": few, **settings}
    env = batches.env_for(name, group_size=settings.get("group_size", 4))
    agent = batches.learner(name, env=env, **settings)
    # The running mean needs two batches behind it before its decay shows.
    learn(agent, env, 3 if "baseline_decay" in settings or settings.get("baseline") == "running_mean" else 2)
    return batches.weights(agent.policy)


INHERITED = {field.name for field in fields(AgentConfig)}
SLOW = (*COUSINS, "trpo", "bond", "xpo", "distillation", "iterated-rlhf", "ppo-ptx", "ppo-klpen")
WHOLE = ("sft", "expert-iteration", "reinforce", "ppo")  # whose settings from the engine the quick suite tests too


@pytest.mark.parametrize(
    ("name", "inherited"),
    slow_unless(
        lambda case: case[0] in WHOLE if case[1] else case[0] not in SLOW, product(batches.LEARNERS, (False, True))
    ),
)
def test_no_setting_is_dead(name, inherited):
    config = registry.load(name).Config
    ends = {}
    for field in fields(config):
        if (field.name in INHERITED) != inherited:
            continue
        context, change = CHANGES[field.name]
        if context is None or field.name in WITHOUT_EFFECT.get(name, {}):
            continue  # what has None has tests of its own
        known = {f.name for f in fields(config)}
        context = BASE.get(name, {}) | {key: value for key, value in context.items() if key in known}
        change = change.get(name, change["default"]) if isinstance(change, dict) else change
        key = tuple(sorted(context.items()))
        if key not in ends:
            ends[key] = end(name, context)
        changed = end(name, context | {field.name: change})
        assert not batches.same(ends[key], changed), f"{name}: {field.name}={change} changes nothing"


def test_the_dead_knob_test_can_fail():
    """Negative control: a setting that can not matter gives the same weights."""
    assert batches.same(end("expert-iteration", {}), end("expert-iteration", {"gamma": 0.5}))
