"""Settings that fit a pretrained model: learning rate, KL target, LoRA, episodes and rows of a forward, by its size.

The algorithms' own defaults are for models of about a million parameters, which learn at 3e-4 to 1e-3. A pretrained
model of a hundred million collapses there within a few iterations. What is chosen here stands in ``config.json`` under
``chosen_by_rule``, and whatever a user gives comes first. Models below :data:`SMALL` are left alone.

Where the numbers come from:

========================================================  ==========================================================
Ziegler et al. 2019 (arXiv:1909.08593); TRL 0.4 to 0.11   KL steered to 6 nats a response; 1e-5 at GPT-2's size
Ouyang et al. 2022 (InstructGPT, arXiv:2203.02155)        supervised 9.65e-6 at 1.3 and 6 B; reward model 9e-6
Huang et al. 2024 (N+ details, arXiv:2403.17031)          PPO 3e-6 at 1 to 6.9 B, KL coefficient 0.05; TRL's too
TRL's defaults for SFT, DPO, GRPO and RLOO                2e-5; 1e-6 for the others
Schulman et al. 2025 (LoRA Without Regret)                LoRA: ten times the rate of full training at any rank; a low
                                                          rank is enough for a reward; all linear maps, not attention's
========================================================  ==========================================================

Full training of models below a billion is set to the upper end (3e-5): a run on a workstation takes tens of steps,
where the sources take thousands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lm_envs.algos.engine.config import AgentConfig

SMALL = 20_000_000
"""Parameters below which the algorithms' own defaults hold."""
LORA_FROM = 100_000_000
"""Parameters from which LoRA is the default: Adam's state and a checkpoint of all weights take 12 bytes for each."""
LORA = {"lora_rank": 16}
LORA_FACTOR = 10.0
KL_TARGET = 6.0
_EPISODES = 64
_TOO_FAR = 10.0  # how many times off a given learning rate is when a warning says so

# Parameters up to which a rate holds; the rates of full training by rewards, and by likelihood of chosen responses.
_RATES = ((1e9, 3e-5, 5e-5), (3e9, 1e-5, 2e-5), (1e10, 3e-6, 1e-5), (math.inf, 1e-6, 5e-6))
_LIKELIHOOD = ("sft", "expert-iteration", "binary-feedme", "reward-conditioning", "quark")
# What learns from the user's own rows had these rates before sizes counted; batches there are many.
_FIXED = {"sft": 2e-5, "reward-modelling": 1e-5}
_PAIRS = ("dpo", "online-dpo", "xpo")
_PAIRS_RATE = 1e-6
# Algorithms with a penalty in the reward whose published coefficient is not 0.
_STEERED = ("ppo", "ppo-ptx", "ppo-klpen", "a2c", "reinforce", "rloo", "remax", "reinforce-plus-plus", "iterated-rlhf")


def learning_rate(algorithm: str, parameters: int, lora: bool) -> float:
    """Return Adam's step size for a model of this many parameters, trained whole or by LoRA."""
    rewards, likelihood = next((r, s) for limit, r, s in _RATES if parameters <= limit)
    rate = likelihood if algorithm in _LIKELIHOOD else _PAIRS_RATE if algorithm in _PAIRS else rewards
    return float(f"{_FIXED.get(algorithm, rate) * (LORA_FACTOR if lora else 1):.3g}")


def rows_at_once(parameters: int) -> int:
    """Return how many responses are sampled together to measure a policy: their keys and values are held at once."""
    return 1024 if parameters < SMALL else 128


def rows_of_a_forward(parameters: int) -> int:
    """Return the micro-batch: rows whose activations are held at once."""
    return 16 if parameters < 1e9 else 4


def settings(
    algorithm: str, config: AgentConfig, parameters: int, lora: bool, given: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Return what the rules choose for an algorithm on a text task; nothing for a small model, or that is ``given``.

    Args:
        config: the algorithm's, with its own defaults and what is given.
        parameters: of the whole model.
        lora: whether adapters are trained.
        given: settings that the user chose, and the KL coefficient if the environment's options have one.
    """
    if parameters < SMALL:
        return {}
    found: dict[str, Any] = {"learning_rate": learning_rate(algorithm, parameters, lora)}
    found["micro_batch"] = rows_of_a_forward(parameters)
    if config.episodes is not None and config.episodes > _EPISODES:
        found["episodes"] = config.group_size * math.ceil(_EPISODES / config.group_size)
    if algorithm in _STEERED and not {"kl_coef", "kl_target"} & set(given):
        found["kl_target"] = KL_TARGET
    return {name: value for name, value in found.items() if name not in given}


def adaptation(parameters: int, given: Mapping[str, Any], possible: bool) -> dict[str, Any]:
    """Return the part of a model to train where the user says nothing: adapters for a large one, if they are
    ``possible``; ``lora_rank`` 0 asks for the whole model."""
    return dict(LORA) if not given and possible and parameters >= LORA_FROM else {}


def far_off(algorithm: str, rate: float, parameters: int, lora: bool) -> str | None:
    """Return a sentence about a learning rate that is ten times off for a model that is not small, None for others."""
    if parameters < SMALL:
        return None
    known = learning_rate(algorithm, parameters, lora)
    if known / _TOO_FAR < rate < known * _TOO_FAR:
        return None
    more = f"{rate / known:.0f} times" if rate > known else f"1/{known / rate:.0f} of"
    what = "LoRA on" if lora else "all weights of"
    end = "it is likely to collapse" if rate > known else "it may not move"
    return (
        f"learning_rate {rate:g} is {more} what suits {what} a model of {parameters / 1e6:,.0f} M parameters: {end}; "
        f"use learning_rate={known:g}, or leave it out"
    )
