"""Other people's PPO on text: the examples with CleanRL's manner, TorchRL and Tianshou, and an MLP that knows nothing
of text."""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation, NormalizeObservation, NormalizeReward, RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics
from torch import nn
from torch.distributions import Categorical

import lm_envs
from lm_envs.algos.other_libraries import network
from lm_envs.env.vector import TextVectorEnv
from tests import tiny
from tests.house import CHECKOUT
from tests.marks import slow_unless

EXAMPLES = ("cleanrl_style_ppo", "torchrl_ppo", "tianshou_ppo")
TOTAL = {"cleanrl_style_ppo": "total_timesteps", "torchrl_ppo": "total_frames", "tianshou_ppo": "total_steps"}


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", CHECKOUT / "examples" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nothing(prompts, completions, **columns):
    return [0.0] * len(completions)


@pytest.fixture
def tiny_ids():
    """Ids of small tasks: one that counts, one whose only reward is the KL penalty."""
    made = {
        "lm_envs/Tiny-v0": tiny.task(reference=tiny.gpt2(dtype=torch.float32)),
        "lm_envs/TinyPenalty-v0": tiny.task(reference=tiny.gpt2(), reward=nothing, judge=nothing, kl_coef=1.0),
    }
    for name, task in made.items():
        gymnasium.register(
            name,
            entry_point="lm_envs.env.single:TextEnv",
            vector_entry_point="lm_envs.env.vector:TextVectorEnv",
            kwargs={"task": task},
        )
    yield
    for name in made:
        del gymnasium.registry[name]


@pytest.fixture
def rewards(monkeypatch):
    """The rewards of every vector step that anybody takes while a penalty is charged, ``(steps, num_envs)``."""
    found, step = [], TextVectorEnv.step

    def watched(self, actions):
        result = step(self, actions)
        if self.kl_coef > 0:
            found.append(result[1])
        return result

    monkeypatch.setattr(TextVectorEnv, "step", watched)
    return found


def run(name, env_id, updates, **changes):
    module = example(name)
    size = {"num_envs": 16, "num_steps": 8, "eval_prompts": 2}
    return module.main(module.Args(env_id=env_id, **size, **{TOTAL[name]: updates * 16 * 8}, **changes))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name):
    assert len((CHECKOUT / "examples" / f"{name}.py").read_text().splitlines()) < 200


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_charges_the_exact_penalty(name, tiny_ids, rewards, monkeypatch):
    """The policy is the reference and stays it, so each token's penalty is zero, if its own row's was reported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*did not report.*")
        run(name, "lm_envs/TinyPenalty-v0", 3, learning_rate=0.0)
    assert len(rewards) == 24 and np.abs(rewards).max() < 1e-5
    # negative controls: nobody reports; rows are exchanged
    rewards.clear()
    monkeypatch.setattr(lm_envs, "report", lambda env, logprobs: None)
    with pytest.warns(UserWarning, match="did not report"):
        run(name, "lm_envs/TinyPenalty-v0", 1, learning_rate=0.0)
    assert np.mean(rewards) < -1
    rewards.clear()
    monkeypatch.setattr(lm_envs, "report", lambda env, logprobs: lm_envs.env.report.report(env, np.roll(logprobs, 1)))
    run(name, "lm_envs/TinyPenalty-v0", 1, learning_rate=0.0)
    assert np.abs(rewards).max() > 0.1


@pytest.mark.parametrize("name", slow_unless("cleanrl_style_ppo".__eq__, EXAMPLES))
def test_an_example_takes_one_forward_for_logits_and_value(name, tiny_ids, monkeypatch):
    reads, read = [], network.read_states

    def counted(policy, rows):
        reads.append(torch.is_grad_enabled())
        return read(policy, rows)

    monkeypatch.setattr(network, "read_states", counted)
    run(name, "lm_envs/Tiny-v0", 2)
    args = example(name).Args()
    passes = args.update_epochs * args.num_minibatches if name == "cleanrl_style_ppo" else args.epochs
    passes *= args.minibatches if name == "torchrl_ppo" else 1
    assert sum(reads) == 2 * passes


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_learns(name, tiny_ids, rewards):
    figures = run(name, "lm_envs/Tiny-v0", 24, learning_rate=3e-3)
    quarter = len(rewards) // 4
    assert np.mean(rewards[-quarter:]) > np.mean(rewards[:quarter]) + 0.15
    assert figures["kl"] > 0.5 and math.isfinite(figures["gold_se"])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_improves_gold_on_reviews(name):
    """As it is run: by two standard errors of the difference."""
    module = example(name)
    found = module.main(module.Args())
    assert found["gold"] - found["start_gold"] > 2 * math.hypot(found["gold_se"], found["start_gold_se"])


def test_the_same_script_trains_on_control():
    module = example("cleanrl_style_ppo")
    settings = {"env_id": "CartPole-v1", "gamma": 0.99, "num_envs": 16, "num_steps": 32, "learning_rate": 3e-3}
    assert module.main(module.Args(**settings, total_timesteps=512))["return"] < 35
    assert module.main(module.Args(**settings, total_timesteps=40 * 512))["return"] > 60


# PPO as it is published for control: floats, an MLP, one env per row.


def layers(*sizes):
    made = [layer for a, b in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*made[:-1])


class FlatAgent(nn.Module):
    """A vector of numbers in, an action and a value out."""

    def __init__(self, envs):
        super().__init__()
        inputs = int(np.prod(envs.single_observation_space.shape))
        self.actor = layers(inputs, 32, int(envs.single_action_space.n))
        self.critic = layers(inputs, 32, 1)

    def forward(self, x, action=None):
        found = Categorical(logits=self.actor(x))
        action = found.sample() if action is None else action
        return action, found.log_prob(action), found.entropy(), self.critic(x).flatten()


def published_ppo(envs, updates, steps=16, epochs=4, minibatches=4, gamma=0.99, lam=0.95, rate=2.5e-3):
    """Returns per update: mean reward of a step, and the loss of the last minibatch."""
    assert isinstance(envs.single_action_space, gymnasium.spaces.Discrete)
    rows = envs.num_envs
    agent = FlatAgent(envs)
    adam = torch.optim.Adam(agent.parameters(), lr=rate, eps=1e-5)
    x = torch.zeros((steps, rows, *envs.single_observation_space.shape))
    action = torch.zeros((steps, rows, *envs.single_action_space.shape))
    logprob, reward, value, done = (torch.zeros(steps, rows) for _ in range(4))
    now, ended = torch.Tensor(envs.reset(seed=1)[0]), torch.zeros(rows)
    curve, finished = [], 0
    for _ in range(updates):
        for t in range(steps):
            x[t], done[t] = now, ended
            with torch.no_grad():
                action[t], logprob[t], _, value[t] = agent(now)
            obs, r, terminated, truncated, infos = envs.step(action[t].long().numpy())
            reward[t] = torch.as_tensor(r)
            now, ended = torch.Tensor(obs), torch.Tensor(np.logical_or(terminated, truncated))
            finished += int(np.sum(infos.get("_episode", 0))) + sum(
                int(np.sum(infos["final_info"].get("_episode", 0))) for _ in range("final_info" in infos)
            )
        with torch.no_grad():
            advantage, follows = torch.zeros(steps, rows), agent(now)[3]
            carried, going = torch.zeros(rows), 1 - ended
            for t in reversed(range(steps)):
                carried = reward[t] + gamma * follows * going - value[t] + gamma * lam * going * carried
                advantage[t], follows, going = carried, value[t], 1 - done[t]
            target = advantage + value
        flat = [v.flatten(0, 1) for v in (x, action, logprob, advantage, target)]
        for _ in range(epochs):
            for part in torch.randperm(steps * rows).chunk(minibatches):
                state, chosen, before, gain, goal = (v[part] for v in flat)
                _, after, entropy, guess = agent(state, chosen.long())
                ratio, gain = (after - before).exp(), (gain - gain.mean()) / (gain.std() + 1e-8)
                policy = torch.max(-gain * ratio, -gain * ratio.clamp(0.8, 1.2)).mean()
                loss = policy + 0.25 * (guess - goal).square().mean() - 0.01 * entropy.mean()
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                adam.step()
        curve.append((float(reward.mean()), float(loss.detach())))
    return np.array(curve), finished


def one_env(*wrappers, **options):
    def make():
        env = gymnasium.make("lm_envs/Tiny-v0", **options)
        for wrapper in wrappers:
            env = wrapper(env)
        return env

    return make


MAKERS = {
    "sync": lambda **o: SyncVectorEnv([one_env(RecordEpisodeStatistics, **o)] * 8),
    "sync, same step": lambda **o: SyncVectorEnv(
        [one_env(RecordEpisodeStatistics, **o)] * 8, autoreset_mode=AutoresetMode.SAME_STEP
    ),
    "sync, flattened": lambda **o: SyncVectorEnv([one_env(FlattenObservation, RecordEpisodeStatistics, **o)] * 8),
    "sync, normalised": lambda **o: SyncVectorEnv(
        [one_env(FlattenObservation, RecordEpisodeStatistics, NormalizeObservation, NormalizeReward, **o)] * 8
    ),
    "native": lambda **o: VectorRecordEpisodeStatistics(gymnasium.make_vec("lm_envs/Tiny-v0", num_envs=8, **o)),
    "native, next step": lambda **o: VectorRecordEpisodeStatistics(
        gymnasium.make_vec("lm_envs/Tiny-v0", num_envs=8, autoreset_mode=AutoresetMode.NEXT_STEP, **o)
    ),
}


@pytest.mark.parametrize("maker", slow_unless({"sync, normalised", "native"}.__contains__, MAKERS))
def test_published_ppo_runs_unchanged(maker, tiny_ids):
    """It reports nothing, which is said once and is no error."""
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="did not report"):
        curve, finished = published_ppo(MAKERS[maker](), updates=2)
    assert np.isfinite(curve).all() and finished > 0


@pytest.mark.slow
def test_published_ppo_learns(tiny_ids):
    torch.manual_seed(0)
    curve, _ = published_ppo(MAKERS["native"](kl_coef=0.0), updates=30)
    assert curve[-5:, 0].mean() > curve[:5, 0].mean() + 0.2
