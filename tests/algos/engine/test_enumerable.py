"""Training on the enumerable task by sampling: how near the exact optimum it comes. What is promised is slow."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lm_envs.algos.engine.settings_enumerable import EPISODES, TABULAR, VALUE_SCALE
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import make_agent, make_config
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.tasks.enumerable import load
from tests.marks import slow_unless

PPO_OF_A_TRANSFORMER = TABULAR["ppo"] | {"epochs": 8, "minibatches": 4, "clip": 0.2, "learning_rate": 2e-3}
PPO_OF_A_TRANSFORMER |= {"anneal": True, "max_grad_norm": 1.0}


def small_transformer(mdp, bandit, seed):
    """A GPT-2 of 0.1 M random weights; it starts at a regret above 1 and learns the reference from the KL penalty."""
    config = GPT2Config(
        vocab_size=mdp.vocab_size,
        n_positions=mdp.prompt_length + mdp.max_new_tokens,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="relu",
        tie_word_embeddings=False,
        bos_token_id=mdp.eos_token_id,
        eos_token_id=mdp.eos_token_id,
        pad_token_id=mdp.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LMPolicy.for_mdp(mdp, GPT2LMHeadModel(config), bandit=bandit)


def regret_after(name, seed, episodes=EPISODES, *, transformer=False, env_class=TextVectorEnv, **overrides):
    settings = PPO_OF_A_TRANSFORMER if transformer else TABULAR[name]
    settings = settings | {"iterations": max(1, episodes // settings["episodes"]), "seed": seed} | overrides
    env = env_class(load(), 1, group_size=settings.get("group_size", 1))
    exact = Exact(env.mdp)
    if transformer:
        policy = small_transformer(env.mdp, env.is_bandit, seed)
    else:
        policy = TabularPolicy(exact, bandit=env.is_bandit, value_scale=VALUE_SCALE)
    agent = make_agent(name, policy, **settings)
    while agent.iterations_done < agent.config.iterations:
        agent.iteration(env)
    assert agent.episodes_done <= episodes
    return exact.regret(policy)


@pytest.mark.parametrize("env_class", [TextVectorEnv, TextBanditVectorEnv])
@pytest.mark.parametrize("name", slow_unless("ppo".__eq__, ["reinforce", "a2c", "ppo"]))
def test_a_tenth_of_the_budget_takes_most_of_the_regret(name, env_class):
    assert regret_after(name, 0, 10_240, env_class=env_class) < 0.4


@pytest.mark.slow
def test_the_small_transformer_learns_on_both_faces():
    for env_class in (TextVectorEnv, TextBanditVectorEnv):
        start = regret_after("ppo", 0, 1024, transformer=True, env_class=env_class, learning_rate=1e-9)
        assert start > 1 and regret_after("ppo", 0, 4096, transformer=True, env_class=env_class) < start - 0.3


@pytest.mark.slow
def test_the_measure_tells_bad_from_good():
    """Negative control: training for another coefficient than the one that is measured leaves the regret high."""
    right = regret_after("reinforce", 0, 20_480)
    for coef in (0.0, 1.5):
        assert regret_after("reinforce", 0, 20_480, kl_coef=coef) > 3 * right


@pytest.mark.parametrize("name", TABULAR)
def test_settings_are_of_real_fields(name):
    assert make_config(name, **TABULAR[name]).episodes == TABULAR[name]["episodes"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["reinforce", "a2c", "ppo"])
def test_regret_of_a_table_after_100k_episodes(name, seed):
    assert regret_after(name, seed) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_regret_of_the_small_transformer_after_100k_episodes(seed):
    assert regret_after("ppo", seed, transformer=True) <= 0.05
