"""Small batches and policies for the agents' tests: exact, in float64, without sampling where that is not the point."""

from __future__ import annotations

from functools import cache

import gymnasium
import torch
from gymnasium.vector import AutoresetMode

from lm_envs.algos.engine.comparisons import preferences
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.policies.mlp import MLPPolicy
from lm_envs.algos.registry import ALGORITHMS, WRAPPERS, load, make_agent
from lm_envs.algos.reward_modelling import RewardPolicy
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.reward.learned import LearnedReward
from lm_envs.trajectories import Trajectories, demonstrations
from tests import tiny

KINDS = {"mdp": TextVectorEnv, "bandit": TextBanditVectorEnv}
# From the registry, so that an algorithm which is added there is tested without another line.
LEARNERS = tuple(name for name in ALGORITHMS if name not in WRAPPERS)
SAMPLERS = tuple(name for name in LEARNERS if not load(name).needs_data)
REWARDED = tuple(name for name in SAMPLERS if name != "distillation")  # learns from a teacher
SMALL = {"episodes": 16, "group_size": 4, "iterations": 8}
ROUNDS = {"annotations": 256, "held_out": 32, "rm_steps": 40, "rm_batch": 32, "rm_learning_rate": 1e-2, "flip": 0.0}


@cache
def text_task():
    return tiny.task()


def text_env(kind: str = "mdp", group_size: int = 4, **options):
    return KINDS[kind](text_task(), 8, group_size=group_size, **options)


def env_for(name: str, kind: str = "mdp", group_size: int = 4):
    """An env that an agent of that name can sample from."""
    if name == "iterated-rlhf":  # makes reward models like the task's
        return KINDS[kind](learned_task(), 8, group_size=group_size)
    return text_env(kind, group_size)


def text_policy(env, kind: str = "mdp", seed: int = 1) -> LMPolicy:
    policy = LMPolicy.for_mdp(env.mdp, tiny.gpt2(seed=seed).requires_grad_(True), bandit=kind == "bandit")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # a critic at zero would hide mistakes in what is done with it
        policy.value_head.weight.normal_(generator=generator)
    return policy


def text_batch(kind: str = "mdp", episodes: int = 16, group_size: int = 4, seed: int = 0) -> Trajectories:
    env = text_env(kind, group_size)
    return rollout(env, text_policy(env, kind), episodes=episodes, seed=seed)


def reward_policy(seed: int = 0) -> RewardPolicy:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=10,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.25,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2ForSequenceClassification(config)
    return RewardPolicy(model.double())


def learned_task():
    """The tiny task with an (untrained) reward model of the policy's tokens, in other units."""
    reward = LearnedReward(reward_policy().model, tiny.tokenizer(), normalise=(0.3, 2.0))
    return tiny.task(reward=reward)


def texts(count: int = 12, seed: int = 0) -> list[list[int]]:
    """Two tokens of prompt and one to five after it; the last is EOS in every other text."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (count,), generator=generator).tolist()
    rows = [torch.randint(1, 10, (length,), generator=generator).tolist() for length in lengths]
    return [row[:-1] + [0] if i % 2 else row for i, row in enumerate(rows)]


def ranked(groups: int = 6, seed: int = 0) -> Trajectories:
    """Groups of two to four texts; more of token 2 ("b") is better, ties broken by place."""
    rows, sizes = texts(4 * groups, seed), [2 + i % 3 for i in range(groups)]
    parts = [rows[4 * i : 4 * i + size] for i, size in enumerate(sizes)]
    ranks = []
    for part in parts:
        order = sorted(range(len(part)), key=lambda i: (-part[i].count(2), i))
        ranks.append([order.index(i) for i in range(len(part))])
    return preferences(parts, ranks, 2, 6)


def learner(name: str, kind: str = "mdp", env=None, **overrides):
    """An agent on the tiny text task, or on the data it needs."""
    algorithm, settings = load(name), SMALL | overrides
    if name == "reward-modelling":
        return make_agent(name, reward_policy(), data=ranked(), **({"episodes": 6} | overrides))
    policy = text_policy(env or text_env(kind, settings["group_size"]), kind)
    if settings.get("value_from") == "reward_model":
        return make_agent(name, policy, learned_task(), **settings)
    if algorithm.needs_data:
        settings = {"episodes": 6 if algorithm.unit == "group" else 8} | overrides
    if algorithm.preference_data:
        if {"pairs", "flip"} & overrides.keys():  # what simulated annotators are told
            return make_agent(name, policy, text_task(), **settings)
        return make_agent(name, policy, data=ranked(), **settings)
    if name == "iterated-rlhf":
        settings = ROUNDS | settings
    if name == "reinforce-plus-plus-baseline":
        settings = {"kl_coef": 0.1} | settings  # its loss needs one, env or not
    if name == "quark":
        settings = {"learn_episodes": None, "minibatches": 2} | settings
    mixed = settings.get("ptx_coef", 0.5) if name == "ppo-ptx" else settings.get("alpha", 0.0)
    data = demonstrations(texts(), 2, 6) if algorithm.needs_data or mixed else None
    agent = make_agent(name, policy, data=data, **settings)
    if name in ("bond", "remax", "vbon", "xpo"):
        agent.mdp = text_env(kind).mdp
    if name == "distillation":
        agent.teacher = LMPolicy.for_mdp(text_env().mdp, tiny.gpt2(seed=5))
    if name == "quark":
        agent.reference = LMPolicy.for_mdp(text_env().mdp, text_task().reference)
    return agent


def batch_for(name: str, kind: str = "mdp") -> Trajectories:
    """What an agent of that name learns from."""
    return next(learner(name).batches()) if load(name).needs_data else text_batch(kind)


def control_env(rows: int = 2, name: str = "CartPole-v1", **options):
    return gymnasium.make_vec(
        name,
        num_envs=rows,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        **options,
    )


def control_batch(episodes: int = 6, seed: int = 0) -> tuple[Trajectories, MLPPolicy]:
    env = control_env()
    policy = MLPPolicy(env, hidden=(8,), seed=seed).double()
    return collect(env, policy, episodes=episodes, seed=seed), policy


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
