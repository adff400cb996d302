"""Settings for control environments, where the algorithms' own defaults, made for a small language model, do not fit.

Tuned with an :class:`~lm_envs.algos.policies.mlp.MLPPolicy` of its default size on eight rows. Two things differ from
text: returns are far from 1, so values are not clipped by distance; and there is one episode per start, so the baseline
is a learned value. On CartPole the gradient's norm is clipped low: without, single seeds collapsed late. A batch of the
cat's may hold a reward of 100 or none, and there clipping would weigh the two alike.
"""

from typing import Any

ROWS = 8
"""Rows of the vector environment that the settings were tuned on."""

_NO_CLIP = 1e6

# What any control environment starts from; a line below per environment adds to it.
_COMMON: dict[str, dict[str, Any]] = {
    "ppo": {
        "steps": 1024,
        "episodes": None,
        "iterations": 97,
        "learning_rate": 1e-3,
        "epochs": 10,
        "minibatches": 4,
        "gamma": 0.98,
        "lam": 0.8,
        "value_clip": None,
        "value_coef": 0.5,
        "max_grad_norm": 0.5,
    },
    "a2c": {
        "steps": 128,
        "episodes": None,
        "iterations": 2340,
        "learning_rate": 1e-3,
        "gamma": 0.98,
        "lam": 0.9,
        "whiten_advantage": False,
        "value_coef": 0.5,
        "max_grad_norm": 0.5,
    },
    # A sum over steps grows with the episode, and its gradient's norm is clipped after the critic's part has been made
    # small enough not to decide it: updates are then of one size from 20 steps to 500.
    "reinforce": {
        "episodes": 8,
        "group_size": 1,
        "iterations": 95,
        "learning_rate": 5e-3,
        "gamma": 0.98,
        "baseline": "value",
        "reward_to_go": True,
        "whiten_advantage": True,
        "value_coef": 1e-3,
        "max_grad_norm": 1.0,
    },
    # No prompts here: the episodes of a batch are compared with one another.
    "rloo": {
        "episodes": 16,
        "group_size": 1,
        "iterations": 110,
        "learning_rate": 1e-2,
        "gamma": 0.98,
        "max_grad_norm": _NO_CLIP,
    },
    "expert-iteration": {"episodes": 32, "group_size": 8, "keep": 2, "iterations": 60, "learning_rate": 5e-3},
}
_COMMON["ppo-klpen"] = _COMMON["ppo"]
_GRPO = {"episodes": 16, "group_size": 1, "iterations": 110, "learning_rate": 1e-2, "gamma": 0.98}
_COMMON["grpo"] = _COMMON["dr-grpo"] = {**_GRPO, "kl_loss": None, "max_grad_norm": _NO_CLIP}
_CAT = {"gamma": 0.95, "max_grad_norm": _NO_CLIP}
_ENVS: dict[tuple[str, str], dict[str, Any]] = {
    ("lm_envs/Cat-v0", "ppo"): {
        **_CAT,
        "steps": 512,
        "iterations": 80,
        "learning_rate": 3e-3,
        "epochs": 4,
        "minibatches": 4,
        "lam": 0.95,
    },
    ("lm_envs/Cat-v0", "a2c"): {**_CAT, "steps": 256, "iterations": 300, "learning_rate": 3e-3, "lam": 0.95},
    ("lm_envs/Cat-v0", "reinforce"): {
        **_CAT,
        "episodes": 16,
        "iterations": 200,
        "whiten_advantage": False,
        "value_coef": 0.5,
    },
}


def control_settings(env_id: str, algorithm: str) -> dict[str, Any]:
    """Overrides of an algorithm's config for a control environment; empty for an algorithm that has none.

    Args:
        env_id: a Gymnasium id; one without settings of its own gets those that any control environment starts from.
        algorithm: a key of :data:`lm_envs.algos.registry.ALGORITHMS`.
    """
    return {**_COMMON.get(algorithm, {}), **_ENVS.get((env_id, algorithm), {})}
