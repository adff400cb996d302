"""What a policy, a reward or an env can do is declared on its class, and the engine goes by the declaration."""

from __future__ import annotations

import ast
from pathlib import Path

import gymnasium
import pytest
import torch

from lm_envs.algos.policies.base import Policy
from lm_envs.algos.policies.mlp import MLPPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.mdp import TextMDP
from lm_envs.env.report import Reachable, text_envs
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.reward.base import WeightedSum, is_dense
from tests import tiny
from tests.algos import batches
from tests.house import CHECKOUT

# What is asked of objects that are not ours: Gymnasium's wrappers, transformers' models and tokenizers, functions that
# users write as rewards, and ids of users' settings.
THIRD_PARTY = {
    "lm_envs/env/report.py": {"unwrapped", "envs"},
    "lm_envs/reward/base.py": {"dense", "__name__", "__module__"},
    "lm_envs/tasks/prompted.py": {"chat_template"},
    "algos/engine/judged_pairs.py": {"score"},
    "algos/policies/recomputing.py": {"activation_checkpointing_enable"},
    "algos/policies/adaptation.py": {"num_hidden_layers", "variable", "generation_config"},
}
ROOMS = ("algos", "lm_envs/env", "lm_envs/tasks")


def probes(path: Path) -> set[str]:
    """The names that a file asks an object for by ``hasattr`` or by ``getattr`` with a default, and ``__dict__``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "__dict__":
            found.add("__dict__")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        asks = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
        if asks and isinstance(node.args[1], ast.Constant):
            found.add(node.args[1].value)
    return found


def test_nothing_is_found_out_by_probing():
    for room in ROOMS:
        for path in sorted((CHECKOUT / room).rglob("*.py")):
            name = str(path.relative_to(CHECKOUT))
            assert probes(path) <= THIRD_PARTY.get(name, set()), name


def test_the_scan_sees_probes(tmp_path):
    (tmp_path / "x.py").write_text('hasattr(a, "b"); getattr(a, "c", None); getattr(a, name); "v" in a.__dict__')
    assert probes(tmp_path / "x.py") == {"b", "c", "__dict__"}


def test_a_policy_says_what_it_cannot_do():
    policy = MLPPolicy(gymnasium.make("CartPole-v1"))
    assert not (policy.keeps_logprob or policy.has_own_critic or policy.reward_tokens) and policy.condition is None
    for call, what in (
        (lambda: policy.add_reward_tokens(2), "no reward tokens"),
        (lambda: policy.critic_of_its_own(torch.nn.Linear(1, 1)), "takes no critic"),
        (lambda: policy.critic_values(batches.text_batch()), "no critic of its own"),
        (lambda: policy.vocabulary, "does not write text"),
        (lambda: Policy().use_q_critic(), "no Q critic"),
    ):
        with pytest.raises(ValueError, match=what):
            call()
    with pytest.raises(NotImplementedError, match="does not write text"):
        policy.respond(torch.zeros(1, 1), torch.zeros(1, 1))


def test_any_policy_that_responds_serves_the_bulk_path():
    class Twos(Policy):
        sequence_obs, uniforms_per_response = True, 6

        def respond(self, prompts, uniforms):
            return torch.full((len(prompts), 6), 2), torch.full((len(prompts), 6), -1.0)

    traj = rollout(batches.text_env(), Twos(), episodes=4)
    assert traj.value is None and traj.score.tolist() == [6.0] * 4


def trained():
    """An agent that kept what its policy sampled, and the batch."""
    env = batches.text_env(group_size=1)
    policy = batches.text_policy(env)
    agent = make_agent("ppo", policy, episodes=8, epochs=1, minibatches=1, learning_rate=0.1)
    forwards = []
    evaluate = policy.evaluate
    policy.evaluate = lambda traj: forwards.append(len(traj)) or evaluate(traj)
    return agent, env, forwards


def test_rows_know_the_weights_that_sampled_them():
    """Some of the batch saves the forward as the whole does; older rows, mixed in or alone, do not."""
    agent, env, forwards = trained()
    old, _ = agent.iteration(env)
    assert forwards == [8]  # the update's own
    traj = agent.sample(env)
    traj.sampled_by = torch.full((8,), agent._weights)
    mixed = type(traj).concatenate([traj.select(slice(4)), old.select(slice(4))])
    for batch, expected in ((old, [8, 8]), (mixed, [8, 8])):
        forwards.clear()
        state, weights = {k: v.clone() for k, v in agent.policy.state_dict().items()}, agent._weights
        agent.update(batch)
        agent.policy.load_state_dict(state)
        agent._weights = weights
        assert forwards == expected
    forwards.clear()
    agent.update(traj.select(slice(3)))
    assert forwards == [3]


def test_two_agents_never_number_their_weights_alike():
    first, env, _ = trained()
    second, _, forwards = trained()
    traj, _ = first.iteration(env)
    second.update(traj)
    assert forwards == [8, 8] and first._weights != second._weights


def test_a_sample_that_drops_rows_is_refused():
    class Best(type(batches.learner("reinforce"))):
        def sample(self, env):
            traj = super().sample(env)
            return traj.select(traj.score > traj.score.median())

    env = batches.text_env()
    agent = Best(batches.text_policy(env), Best.Config(episodes=16, group_size=4))
    with pytest.raises(ValueError, match=r"sample\(\) returned \d+ rows and sampled 16: .*leave rows out in select"):
        agent.iteration(env)
    assert agent.episodes_done == 0 and agent.iterations_done == 0

    class Filtered(type(batches.learner("reinforce"))):
        def update(self, traj):
            return super().update(traj.select(traj.score >= traj.score.median()))

    agent = Filtered(batches.text_policy(env), Best.Config(episodes=16, group_size=4, baseline="running_mean"))
    first, _ = agent.iteration(env)
    second, _ = agent.iteration(env)
    assert agent.episodes_done == 32  # what was sampled
    assert first.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 and int(second.group.min()) == 4


def per_token(prompts, completions, completion_ids, **columns):
    return [[0.5] * len(ids) for ids in completion_ids]


def test_a_reward_says_whether_it_is_dense():
    declared = lambda **given: per_token(**given)  # noqa: E731
    declared.dense = True
    assert is_dense(declared) and is_dense(WeightedSum([(1.0, tiny.count_b_minus_c), (2.0, declared)]))
    assert not is_dense(per_token) and not is_dense(WeightedSum([(1.0, tiny.count_b_minus_c)]))
    composed = WeightedSum([(1.0, tiny.count_b_minus_c), (2.0, declared)])
    env = TextVectorEnv(tiny.task(reward=composed), 2, kl_coef=0.0)
    env.reset(seed=0)
    paid = [env.step([2, 2])[1].tolist() for _ in range(6)]
    assert paid[:5] == [[1.0, 1.0]] * 5 and paid[5] == [7.0, 7.0]  # six tokens of 2 * 0.5, and six b's at the end


def test_one_that_does_not_is_refused_on_every_path():
    task = tiny.task(reward=per_token)
    env = TextVectorEnv(task, 1, kl_coef=0.0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="'per_token' returned a number per token.*dense = True"):
        env.step([tiny.EOS])
    with pytest.raises(ValueError, match="dense = True"):
        rollout(env, batches.text_policy(env), episodes=2)


def test_report_reaches_what_derives_from_reachable():
    class Double:  # has the names, and is no text env
        def report(self, logprobs): ...
        def set_kl_coef(self, kl_coef): ...

    env = batches.text_env()
    assert text_envs(env) == [env] and isinstance(env, Reachable) and isinstance(env.mdp, TextMDP)
    assert text_envs(Double()) == []
