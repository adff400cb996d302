"""Between an agent and a text environment: its log-probabilities, and the weight of the KL penalty.

Functions, not methods, because Gymnasium's wrappers hide the methods of what they wrap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from lm_envs.env.mdp import TextMDP
    from lm_envs.tasks.base import TextTask


class Reachable:
    """A text environment that :func:`report` and :func:`set_kl_coef` reach; every one of them derives from this.

    Attributes:
        mdp: what is played.
        face: "mdp", a token per step, or "bandit", a response per step.
    """

    mdp: TextMDP
    face: Literal["mdp", "bandit"]

    @property
    def task(self) -> TextTask:
        """The task that is played."""
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
        """Tell the log-probability of the coming actions; see :func:`lm_envs.report`."""
        raise NotImplementedError


def text_envs(env: Any) -> list[Reachable]:
    """The text environments inside ``env``: itself, what wrappers hide, or the members of a ``SyncVectorEnv``."""
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
        ValueError: wrong shape, or something that is no log-probability.
        TypeError: there is no text environment inside ``env``.
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
    """Set the weight of the KL penalty (score units per nat) from the next step on, as a schedule of your own does.

    An agent whose own setting says otherwise refuses the environment.

    Raises:
        ValueError: negative or not finite.
        TypeError: there is no text environment inside ``env``.
    """
    for member in _need(env):
        member.set_kl_coef(kl_coef)
