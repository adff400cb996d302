"""Train a language model to write better reviews with unmodified Stable-Baselines3 and sb3-contrib.

    python examples/sb3_reviews.py ppo a2c maskable-ppo

Each printed line has an algorithm and the gold reward of its texts on test prompts, which training never sees; the
first line is the SFT model that all start from. docs/stable_baselines3.md explains the settings.
"""

from __future__ import annotations

import sys
import time

import gymnasium
import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import VecMonitor

from lm_envs.algos.other_libraries.sb3 import (
    CausalLMActorCriticPolicy,
    MaskableCausalLMActorCriticPolicy,
    TextVecEnv,
)
from lm_envs.reward.base import call_reward

ROWS = 64  # parallel texts
STEPS = 24  # tokens of each row per update: the maximum length of a review
TOKENS = 40_000  # training tokens per algorithm
TEST_TEXTS = 512

# The minibatch is the whole buffer, so that each text is read once per epoch; a text is one undiscounted episode.
PROXIMAL = dict(
    n_steps=STEPS, batch_size=ROWS * STEPS, n_epochs=4, gamma=1.0, gae_lambda=0.95, vf_coef=0.1, max_grad_norm=1.0
)
ALGORITHMS = {
    "ppo": (PPO, CausalLMActorCriticPolicy, PROXIMAL | dict(learning_rate=1e-3), {}),
    "a2c": (
        A2C,
        CausalLMActorCriticPolicy,
        dict(n_steps=STEPS // 2, learning_rate=2e-3, gamma=1.0, gae_lambda=0.95, vf_coef=0.1, max_grad_norm=1.0)
        | dict(use_rms_prop=False, normalize_advantage=True),
        {},
    ),
    "maskable-ppo": (
        MaskablePPO,
        MaskableCausalLMActorCriticPolicy,
        PROXIMAL | dict(learning_rate=1e-3),
        dict(reference_top_k=32),
    ),
}


def make_env(rows=ROWS, **options):
    return VecMonitor(TextVecEnv(gymnasium.make_vec("lm_envs/Reviews-v0", num_envs=rows, **options)))


def gold(model, texts, **options):
    """Mean gold reward on test prompts and its standard error: the library's own predict, sampling."""
    env = make_env(min(texts, 128), split="test", kl_coef=0.0, **options)
    env.seed(1)
    obs, prompts, responses, reasons = env.reset(), [], [], []
    while len(responses) < texts:
        masks = {"action_masks": np.stack(env.env_method("action_masks"))} if isinstance(model, MaskablePPO) else {}
        obs, _, dones, infos = env.step(model.predict(obs, **masks)[0])
        for lm in (info["lm"] for info, done in zip(infos, dones, strict=True) if done):
            prompts.append(lm["prompt"]), responses.append(lm["response"]), reasons.append(lm["finish_reason"])
    scores = call_reward(env.get_attr("task")[0].judge, prompts, responses, [[]] * len(responses), reasons)
    return scores.mean(), scores.std() / len(scores) ** 0.5


def train(name, tokens=TOKENS, rows=ROWS, seed=0, **changes):
    algorithm, policy, settings, options = ALGORITHMS[name]
    if "batch_size" in settings:
        settings = settings | dict(batch_size=rows * STEPS)
    model = algorithm(policy, make_env(rows, **options), seed=seed, device="cpu", **settings | changes)
    return model.learn(tokens)


def main(*names, tokens=TOKENS, rows=ROWS, texts=TEST_TEXTS, seed=0):
    """``{name: (gold before, its s.e., gold after, its s.e., mean return of the last training texts, seconds)}``."""
    start = PPO(CausalLMActorCriticPolicy, make_env(1), n_steps=2, batch_size=2, seed=seed)
    before, found = gold(start, texts), {}
    print(f"sft: gold {before[0]:.2f} ± {before[1]:.2f}", flush=True)
    for name in names or ALGORITHMS:
        begun = time.process_time()
        model = train(name, tokens, rows, seed)
        seconds = time.process_time() - begun
        after = gold(model, texts, **ALGORITHMS[name][3])
        returns = float(np.mean([episode["r"] for episode in model.ep_info_buffer]))
        found[name] = (*before, *after, returns, seconds)
        print(
            f"{name}: gold {after[0]:.2f} ± {after[1]:.2f}, return {returns:.2f}, {seconds:.0f} processor seconds",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
