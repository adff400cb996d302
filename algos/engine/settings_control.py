"""Settings for control environments, where the algorithms' own defaults, made for a small language model, do not fit.

Tuned with an :class:`~lm_envs.algos.policies.mlp.MLPPolicy` of its default size on eight rows. Two things differ from
text: returns are far from 1, so values are not clipped by distance; and there is one episode per start, so the baseline
is a learned value. On CartPole the gradient's norm is clipped low, because single seeds collapsed late without it. A
batch of the cat's may hold a reward of 100 or none, and clipping would weigh the two alike.
"""

from typing import Any

ROWS = 8
"""Rows of the vector environment that the settings were tuned on."""

_NO_CLIP = 1e6
_CRITIC: dict[str, Any] = {"episodes": None, "learning_rate": 1e-3, "value_coef": 0.5, "max_grad_norm": 0.5}
_PPO = {**_CRITIC, "steps": 1024, "iterations": 97, "epochs": 10, "minibatches": 4, "lam": 0.8, "value_clip": None}
_SINGLE: dict[str, Any] = {"group_size": 1, "gamma": 0.98}
# A sum over steps grows with the episode, and its gradient's norm is clipped after the critic's part has been made
# small enough not to decide it: updates are then of one size from 20 steps to 500.
_REINFORCE = {**_SINGLE, "episodes": 8, "iterations": 95, "learning_rate": 5e-3, "max_grad_norm": 1.0}
_REINFORCE |= {"baseline": "value", "reward_to_go": True, "whiten_advantage": True, "value_coef": 1e-3}
_GROUP: dict[str, Any] = {**_SINGLE, "episodes": 16, "iterations": 110, "learning_rate": 1e-2}
_GRPO: dict[str, Any] = {**_GROUP, "kl_loss": None, "max_grad_norm": _NO_CLIP}

# What any control environment starts from; a line below per environment adds to it.
_COMMON: dict[str, dict[str, Any]] = {
    "ppo": {**_PPO, "gamma": 0.98},
    "ppo-klpen": {**_PPO, "gamma": 0.98},
    "a2c": {**_CRITIC, "steps": 128, "iterations": 2340, "gamma": 0.98, "lam": 0.9, "whiten_advantage": False},
    "reinforce": _REINFORCE,
    # Without prompts, the episodes of a batch are compared with one another.
    "rloo": {**_GROUP, "max_grad_norm": _NO_CLIP},
    "trpo": {**_GROUP, "old_kl_limit": 0.02},
    "grpo": _GRPO,
    "dr-grpo": _GRPO,
    "expert-iteration": {"episodes": 32, "group_size": 8, "keep": 2, "iterations": 60, "learning_rate": 5e-3},
}
_CAT: dict[str, Any] = {"gamma": 0.95, "max_grad_norm": _NO_CLIP}
_CAT_CRITIC = {**_CAT, "learning_rate": 3e-3, "lam": 0.95}
_ENVS: dict[str, dict[str, dict[str, Any]]] = {
    "lm_envs/Cat-v0": {
        "ppo": {**_CAT_CRITIC, "steps": 512, "iterations": 80, "epochs": 4, "minibatches": 4},
        "a2c": {**_CAT_CRITIC, "steps": 256, "iterations": 300},
        "reinforce": {**_CAT, "episodes": 16, "iterations": 200, "whiten_advantage": False, "value_coef": 0.5},
    },
}


def control_settings(env_id: str, algorithm: str) -> dict[str, Any]:
    """Overrides of an algorithm's config for a control environment; empty for an algorithm that has none.

    Args:
        env_id: a Gymnasium id; one without settings of its own gets those that any control environment starts from.
        algorithm: a key of :data:`lm_envs.algos.registry.ALGORITHMS`.
    """
    return {**_COMMON.get(algorithm, {}), **_ENVS.get(env_id, {}).get(algorithm, {})}
