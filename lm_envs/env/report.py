"""An agent's report of its log-probabilities to a text environment, and the weight of the KL penalty.

Both are functions, because Gymnasium's wrappers hide methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from lm_envs.env.mdp import TextMDP
    from lm_envs.tasks.base import TextTask


class Reachable:
    """The base of every text environment, by which :func:`report` and :func:`set_kl_coef` find it.

    Attributes:
        mdp: the decision process.
        is_bandit: whether a step is a whole response, not a token.
    """

    mdp: TextMDP
    is_bandit: bool

    @property
    def task(self) -> TextTask:
        """The task."""
        return self.mdp.task

    @property
    def kl_coef(self) -> float:
        """The weight of the KL penalty, which the MDP holds."""
        return self.mdp.kl_coef

    @kl_coef.setter
    def kl_coef(self, kl_coef: float) -> None:
        self.set_kl_coef(kl_coef)

    def set_kl_coef(self, kl_coef: float) -> None:
        """Set it from the next step on; see :func:`lm_envs.set_kl_coef`."""
        self.mdp.set_kl_coef(kl_coef)

    def report(self, logprobs: ArrayLike) -> None:
        """Report the log-probability of the next actions; see :func:`lm_envs.report`."""
        raise NotImplementedError


def text_envs(env: Any) -> list[Reachable]:
    """Return the text environments in ``env``: itself, one inside wrappers, or the members of a ``SyncVectorEnv``."""
    inner = getattr(env, "unwrapped", env)
    if isinstance(inner, Reachable):
        return [inner]
    return [found for member in getattr(inner, "envs", ()) for found in text_envs(member)]


def _need(env: Any) -> list[Reachable]:
    found = text_envs(env)
    if not found:
        raise TypeError(
            f"{type(env).__name__} holds no text environment that can be reached: lm_envs.report and set_kl_coef work "
            "on lm_envs environments, through wrappers and in a SyncVectorEnv, not across processes"
        )
    return found


def report(env: Any, logprobs: ArrayLike) -> None:
    """Report the log-probabilities of the next step's actions, so that the environment charges the exact KL penalty.

    Args:
        env: a text environment, wrapped or not, or a ``SyncVectorEnv`` of some.
        logprobs: nats; a number for one environment, ``(num_envs,)`` for a vector environment. In a bandit env the
            log-probability of the whole response.

    Raises:
        ValueError: wrong shape, or a number that is not a log-probability.
        TypeError: there is no text environment in ``env``.
    """
    inner = _need(env)
    if len(inner) == 1:
        return inner[0].report(logprobs)
    values = np.asarray(logprobs, dtype=np.float64)
    if values.shape != (len(inner),):
        shapes = f"shape ({len(inner)},), got shape {values.shape}"
        raise ValueError(f"report expects one log-probability per environment, {shapes}")
    for member, value in zip(inner, values, strict=True):
        member.report(value)


def set_kl_coef(env: Any, kl_coef: float) -> None:
    """Set the weight of the KL penalty (score units per nat) from the next step on, as in a schedule of your own.

    An agent with another setting refuses the environment.

    Raises:
        ValueError: negative or not finite.
        TypeError: there is no text environment in ``env``.
    """
    for member in _need(env):
        member.set_kl_coef(kl_coef)
