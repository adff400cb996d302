"""Between an agent and a text environment: its log-probabilities, and the weight of the KL penalty.

Functions, not methods, because Gymnasium's wrappers hide the methods of what they wrap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def text_envs(env: Any) -> list[Any]:
    """The text environments inside ``env``: itself, what wrappers hide, or the members of a ``SyncVectorEnv``."""
    inner = getattr(env, "unwrapped", env)
    if hasattr(inner, "report") and hasattr(inner, "set_kl_coef"):
        return [inner]
    return [found for member in getattr(inner, "envs", ()) for found in text_envs(member)]


def _need(env: Any) -> list[Any]:
    found = text_envs(env)
    if not found:
        raise TypeError(
            f"{type(env).__name__} holds no text environment that can be reached: lm_envs.report and "
            f"lm_envs.set_kl_coef work on "
            "lm_envs environments, through wrappers and in a SyncVectorEnv, not across processes"
        )
    return found


def report(env: Any, logprobs: ArrayLike) -> None:
    """Tell the environment the log-probabilities of the actions of the next step, so that it charges the exact KL
    penalty.

    Args:
        env: a text environment, wrapped or not, or a ``SyncVectorEnv`` of some.
        logprobs: nats; a number for one environment, ``(num_envs,)`` for a vector environment. On the bandit face the
            log-probability of the whole response.

    Raises:
        ValueError: wrong shape, or something that is no log-probability.
        TypeError: there is no text environment inside ``env``.
    """
    inner = _need(env)
    if len(inner) == 1:
        inner[0].report(logprobs)
        return
    values = np.asarray(logprobs, dtype=np.float64)
    if values.shape != (len(inner),):
        raise ValueError(
            f"report expects one log-probability per environment, shape ({len(inner)},), got shape {values.shape}"
        )
    for member, value in zip(inner, values, strict=True):
        member.report(value)


def set_kl_coef(env: Any, kl_coef: float) -> None:
    """Set the weight of the KL penalty (score units per nat) from the next step on, as adaptive controllers do.

    Raises:
        ValueError: negative or not finite.
        TypeError: there is no text environment inside ``env``.
    """
    for member in _need(env):
        member.set_kl_coef(kl_coef)
