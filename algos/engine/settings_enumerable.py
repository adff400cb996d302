"""Settings for a table on the enumerable task.

Tuned on its default draw with 100,000 episodes. Differences from the defaults, which are for a small language model:
near the optimum all responses have the same return (``r - beta log pi/ref = J*``), so its noise vanishes there and
neither annealing nor whitening, which would amplify it again, helps; lambda is 1, because a table of values learns
slowly at rarely visited states; and gradients are not clipped by norm, since Adam scales each by itself.
"""

from typing import Any

from lm_envs.tasks.enumerable import EnumerableConfig

EPISODES = 100_000
"""The budget that the settings were tuned for."""

VALUE_SCALE = 3.0
"""The tabular policy's. At 1 the critic is still far off when the first tokens are learned, which sometimes costs a
branch of the tree: on 1 of 5 seeds A2C and PPO then ended at a regret of 0.03 instead of 0.015."""

_TABLE: dict[str, Any] = {"anneal": False, "max_grad_norm": 1e6}
_CRITIC: dict[str, Any] = {"whiten_advantage": False, "lam": 1.0, "value_coef": 0.5}
_PPO: dict[str, Any] = {**_CRITIC, "value_clip": None, "episodes": 1024}
_GROUP: dict[str, Any] = {"group_size": 16, "episodes": 256, "learning_rate": 0.07}
_BETA = EnumerableConfig.kl_coef
# As many responses as the others sample, and annotators that follow the reward by Bradley-Terry without further errors,
# as DPO assumes.
_PAIRS: dict[str, Any] = {"max_grad_norm": 1e6, "pairs": EPISODES // 2, "flip": 0.0, "learning_rate": 0.1}

TABULAR: dict[str, dict[str, Any]] = {
    "reinforce": {**_TABLE, **_GROUP, "baseline": "leave_one_out"},
    "rloo": {**_TABLE, **_GROUP},
    "vbon": {**_TABLE, **_GROUP, "reference_samples": 4096},
    "bond": {**_TABLE, **_GROUP, "anchor_rate": 0.1},
    "dr-grpo": {**_TABLE, **_GROUP, "minibatches": 1},
    # k3 and its place are published; with the task's coefficient only its bias is left.
    "grpo": {**_TABLE, **_GROUP, "minibatches": 1, "kl_coef": _BETA},
    # The penalty for long responses is another objective. A clip of a mean over tokens is narrow by GSPO's paper, which
    # takes four steps per batch; here there is one, so nothing is ever clipped.
    "dapo": {**_TABLE, **_GROUP, "minibatches": 1, "overlong": 0.0},
    "gspo": {**_TABLE, **_GROUP, "minibatches": 1},
    "sapo": {**_TABLE, **_GROUP, "minibatches": 1},
    "cispo": {**_TABLE, **_GROUP, "minibatches": 1},
    "reinforce-plus-plus": {**_TABLE, **_GROUP, "minibatches": 1, "group_size": 1},
    "reinforce-plus-plus-baseline": {**_TABLE, **_GROUP, "minibatches": 1},
    "remax": {**_TABLE, **_GROUP, "group_size": 1},
    # A rare state's part of the Fisher matrix is as small as its share of a batch, so damping has to be smaller. Steps
    # do not shrink with the gradient, so the limit is annealed.
    "trpo": {**_GROUP, "episodes": 1024, "old_kl_limit": 0.02, "damping": 1e-4, "anneal": True},
    "a2c": {**_TABLE, **_CRITIC, "episodes": 128, "learning_rate": 0.05},
    "ppo": {**_TABLE, **_PPO, "epochs": 10, "minibatches": 1, "clip": 0.3, "learning_rate": 0.02},
    "ppo-klpen": {**_TABLE, **_PPO, "epochs": 10, "minibatches": 1, "learning_rate": 0.02},
    "expert-iteration": {**_TABLE, "episodes": 4096, "group_size": 16, "epochs": 4, "learning_rate": 0.05},
    "quark": {**_TABLE, "episodes": 1024, "learn_episodes": 4096, "learning_rate": 0.05, "kl_coef": 0.05},
    "online-dpo": {**_TABLE, "episodes": 256, "beta": _BETA, "learning_rate": 0.05},
    "xpo": {**_TABLE, "episodes": 256, "beta": _BETA, "learning_rate": 0.05},
    "distillation": {**_TABLE, "episodes": 256, "learning_rate": 0.1, "teacher": "optimum"},
    "dpo": {**_PAIRS, "episodes": 500, "beta": _BETA, "learning_rate": 0.3},
    "binary-feedme": {**_PAIRS, "episodes": 500},
    "reward-conditioning": {**_PAIRS, "episodes": 1000},
}
"""For a :class:`~lm_envs.algos.policies.tabular.TabularPolicy` with :data:`VALUE_SCALE`, by algorithm."""
