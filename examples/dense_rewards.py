"""A reward per token or per sentence against the same sum at the end: how much sooner PPO learns, by GAE's lambda.

    python examples/dense_rewards.py [EPISODES [SEEDS]]

The task is exactly solvable: three tokens and EOS, at most seven tokens, and a weight per prompt and token. In one form
each token pays its weight at once, in another a sentence pays for its tokens when its full stop (the token `a`) is
written or the text ends, and in the third all of it comes at the end. All have the same optimum, so the exact regret
compares them: 0 at the optimum, 1 at the start.
"""

import sys
from dataclasses import replace

import numpy as np
import torch

from lm_envs.algos.engine.settings_enumerable import TABULAR, VALUE_SCALE
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.vector import TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.tasks.enumerable import EnumerableConfig, load

SIZES = {"tokens": 3, "horizon": 7, "prompts": 2}
LAMBDAS = (0.0, 0.5, 0.95, 1.0)
STOP = 0
"""The token that ends a sentence."""


class PerToken:
    """Pays ``weights[prompt, token]`` for each token."""

    dense = True

    def __init__(self, weights, rows):
        self.weights, self.rows = weights, rows

    def __call__(self, prompts, completion_ids, **columns):
        return [self.weights[self.rows[text]][list(ids)] for text, ids in zip(prompts, completion_ids, strict=True)]


class PerSentence(PerToken):
    """Pays the sum of a sentence's weights with its last token."""

    def __call__(self, prompts, completion_ids, **columns):
        paid = []
        for weights, ids in zip(super().__call__(prompts, completion_ids), completion_ids, strict=True):
            ends = np.array([i for i, token in enumerate(ids) if token == STOP or i == len(ids) - 1], dtype=int)
            each = np.zeros(len(ids))
            each[ends] = np.diff(weights.cumsum()[ends], prepend=0.0)
            paid.append(each)
        return paid


def tasks(seed=0):
    """The task with its reward at the end, per sentence and per token."""
    config = EnumerableConfig(**SIZES)
    weights = np.random.default_rng(seed).normal(size=(config.prompts, config.tokens + 1)) / 2
    responses = config.tree.responses()
    total = np.where(responses >= 0, weights[:, responses.clamp(min=0)], 0.0).sum(axis=2)
    end = load(rewards=total, **SIZES)
    rows = {end.tokenizer.decode(prompt): row for row, prompt in enumerate(end.prompts["train"])}
    dense = {"per sentence": PerSentence, "per token": PerToken}
    return {"end": end} | {name: replace(end, reward=kind(weights, rows)) for name, kind in dense.items()}


def regret(task, exact, lam, seed, episodes):
    env = TextVectorEnv(task, 1)
    policy = TabularPolicy(exact, value_scale=VALUE_SCALE)
    settings = TABULAR["ppo"] | {"lam": lam, "seed": seed, "episodes": 512, "iterations": episodes // 512}
    agent = make_agent("ppo", policy, **settings)
    while agent.iterations_done < agent.config.iterations:
        agent.iteration(env)
    return exact.regret(policy)


def main(episodes=10_240, seeds=3):
    torch.set_num_threads(1)
    made = tasks()
    exact = Exact(TextVectorEnv(made["end"], 1).mdp)
    print(f"exact regret after {episodes:,} episodes, mean over {seeds} seeds (standard deviation)")
    for lam in LAMBDAS:
        found = {name: [regret(task, exact, lam, s, episodes) for s in range(seeds)] for name, task in made.items()}
        texts = [f"{name} {np.mean(x):.3f} ({np.std(x):.3f})" for name, x in found.items()]
        print(f"lambda {lam:<4}  " + "   ".join(texts), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
