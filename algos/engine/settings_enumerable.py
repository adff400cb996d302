"""Settings for the enumerable task, and the small transformer that learns on it.

Tuned on its default draw with 100,000 episodes. Differences from the defaults, which are for a small language model:
near the optimum the return of whole responses is the same for all (``r - beta log pi/ref = J*``), so its noise vanishes
there, and neither annealing nor whitening, which would blow it up again, helps; lambda is 1, because a table of values
learns slowly at rarely visited states; and gradients are not clipped by norm, since Adam scales each by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lm_envs.algos.policies.base import Face
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import TextMDP
from lm_envs.tasks.enumerable import EnumerableConfig

EPISODES = 100_000
"""The budget that the settings were tuned for."""

VALUE_SCALE = 3.0
"""Of the tabular policy. At 1 the critic is still far off when the first tokens are learned, which now and then costs a
branch of the tree: on 1 of 5 seeds A2C and PPO then ended at a regret of 0.03 instead of 0.015."""

_TABLE: dict[str, Any] = {"anneal": False, "max_grad_norm": 1e6}
_CRITIC: dict[str, Any] = {"whiten_advantage": False, "lam": 1.0, "value_coef": 0.5}
_PPO: dict[str, Any] = {**_CRITIC, "value_clip": None, "episodes": 1024}
_GROUP: dict[str, Any] = {"group_size": 16, "episodes": 256, "learning_rate": 0.07}
_BETA = EnumerableConfig.kl_coef
# As many responses as the others sample, and annotators that follow the reward by Bradley-Terry without further errors:
# what DPO is derived for.
_PAIRS: dict[str, Any] = {"max_grad_norm": 1e6, "pairs": EPISODES // 2, "flip": 0.0, "learning_rate": 0.1}

TABULAR: dict[str, dict[str, Any]] = {
    "reinforce": {
        **_TABLE,
        "baseline": "leave_one_out",
        "group_size": 16,
        "episodes": 256,
        "learning_rate": 0.07,
    },
    "rloo": {**_TABLE, **_GROUP},
    "dr-grpo": {**_TABLE, **_GROUP, "minibatches": 1},
    # k3 and its place are published; the coefficient is the task's, so that what is left is its bias.
    "grpo": {**_TABLE, **_GROUP, "minibatches": 1, "kl_coef": _BETA},
    "a2c": {**_TABLE, **_CRITIC, "episodes": 128, "learning_rate": 0.05},
    "ppo": {**_TABLE, **_PPO, "epochs": 10, "minibatches": 1, "clip": 0.3, "learning_rate": 0.02},
    "ppo-klpen": {**_TABLE, **_PPO, "epochs": 10, "minibatches": 1, "learning_rate": 0.02},
    "expert-iteration": {**_TABLE, "episodes": 4096, "group_size": 16, "epochs": 4, "learning_rate": 0.05},
    "quark": {**_TABLE, "episodes": 1024, "learn_episodes": 4096, "learning_rate": 0.05, "kl_coef": 0.05},
    "online-dpo": {**_TABLE, "episodes": 256, "beta": _BETA, "learning_rate": 0.05},
    "dpo": {**_PAIRS, "episodes": 500, "beta": _BETA, "learning_rate": 0.3},
    "binary-feedme": {**_PAIRS, "episodes": 500},
    "reward-conditioning": {**_PAIRS, "episodes": 1000},
}
"""For a :class:`~lm_envs.algos.policies.tabular.TabularPolicy` with :data:`VALUE_SCALE`, by algorithm."""

TRANSFORMER: dict[str, dict[str, Any]] = {
    "ppo": {**_PPO, "epochs": 8, "minibatches": 4, "learning_rate": 2e-3},
}
"""For :func:`small_transformer`, by algorithm."""


def enumerable_settings(algorithm: str, *, transformer: bool = False, episodes: int | None = None) -> dict[str, Any]:
    """Overrides of an algorithm's config, iterations included.

    Args:
        algorithm: a key of :data:`TABULAR`, or of :data:`TRANSFORMER`.
        transformer: for the small transformer.
        episodes: the budget; None is :data:`EPISODES`.

    Raises:
        ValueError: there are no settings for the algorithm.
    """
    known = TRANSFORMER if transformer else TABULAR
    if algorithm not in known:
        raise ValueError(f"no settings for {algorithm!r} on the enumerable task; there are {', '.join(known)}")
    settings = known[algorithm]
    return {**settings, "iterations": max(1, (EPISODES if episodes is None else episodes) // settings["episodes"])}


def small_transformer(mdp: TextMDP, *, face: Face = "mdp", seed: int = 0, width: int = 64, layers: int = 2) -> LMPolicy:
    """A GPT-2 with random weights that fits the task, float32; about 0.1 M parameters at its default size.

    It starts far from the reference (a regret above 1) and learns it from the KL penalty.

    Args:
        seed: of the weights; the caller's global generator is left as it was.
        width, layers: its size; heads are of width 16.
    """
    config = GPT2Config(
        vocab_size=mdp.vocab_size,
        n_positions=mdp.prompt_length + mdp.max_new_tokens,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // 16),
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
        return LMPolicy.for_mdp(mdp, GPT2LMHeadModel(config), face=face)
