"""Training on the enumerable task by sampling: how near the exact optimum it comes. What is promised is slow."""

import pytest

from lm_envs.algos.engine.settings_enumerable import (
    EPISODES,
    TABULAR,
    TRANSFORMER,
    VALUE_SCALE,
    enumerable_settings,
    small_transformer,
)
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.tasks.enumerable import load


def regret_after(name, seed, episodes=EPISODES, *, transformer=False, env_class=TextVectorEnv, **overrides):
    settings = enumerable_settings(name, transformer=transformer, episodes=episodes) | {"seed": seed} | overrides
    env = env_class(load(), 1, group_size=settings.get("group_size", 1))
    exact = Exact(env.mdp)
    if transformer:
        policy = small_transformer(env.mdp, face=env.face, seed=seed)
    else:
        policy = TabularPolicy(exact, face=env.face, value_scale=VALUE_SCALE)
    agent = make_agent(name, policy, **settings)
    while agent.iterations_done < agent.config.iterations:
        agent.iteration(env)
    assert agent.episodes_done <= episodes
    return exact.regret(policy)


@pytest.mark.parametrize("env_class", [TextVectorEnv, TextBanditVectorEnv])
@pytest.mark.parametrize("name", ["reinforce", "a2c", "ppo"])
def test_a_tenth_of_the_budget_takes_most_of_the_regret(name, env_class):
    assert regret_after(name, 0, 10_240, env_class=env_class) < 0.4


def test_the_small_transformer_learns_on_both_faces():
    for env_class in (TextVectorEnv, TextBanditVectorEnv):
        start = regret_after("ppo", 0, 1024, transformer=True, env_class=env_class, learning_rate=1e-9)
        assert start > 1 and regret_after("ppo", 0, 4096, transformer=True, env_class=env_class) < start - 0.3


def test_the_measure_tells_bad_from_good():
    """Negative control: training for another coefficient than the one that is measured leaves the regret high."""
    right = regret_after("reinforce", 0, 40_960)
    for coef in (0.0, 1.5):
        assert regret_after("reinforce", 0, 40_960, kl_coef=coef) > 3 * right


def test_settings_are_of_real_fields_and_refuse_the_unknown():
    for name in TABULAR:
        assert enumerable_settings(name)["iterations"] == EPISODES // TABULAR[name]["episodes"]
    with pytest.raises(ValueError, match="no settings for 'sft' on the enumerable task; there are reinforce"):
        enumerable_settings("sft")
    with pytest.raises(ValueError, match="there are ppo"):
        enumerable_settings("a2c", transformer=True)
    assert set(TRANSFORMER) <= set(TABULAR)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["reinforce", "a2c", "ppo"])
def test_regret_of_a_table_after_100k_episodes(name, seed):
    assert regret_after(name, seed) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_regret_of_the_small_transformer_after_100k_episodes(seed):
    assert regret_after("ppo", seed, transformer=True) <= 0.05
