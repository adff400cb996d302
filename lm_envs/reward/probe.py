"""A linear probe: a reward that is linear in a language model's hidden states, learned from a few hundred preferences.

With so few, a head on the last token of a model that is trained along learns little; the mean state of a response is
a summary that the model has already made (Alain and Bengio 2016, arXiv:1610.01644, on probes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lm_envs.reward.likelihood import Likelihood

_PENALTIES = tuple(10.0**k for k in range(-1, 6))
_STEPS = 30  # of Newton's method, which needs about six


class LinearProbe:
    """The reward ``w . h``, with h the mean hidden state of a response's tokens after a layer, its prompt before it.

    Args:
        likelihood: the language model.
        weights: ``(d,)``.
        layer: see :meth:`~lm_envs.reward.likelihood.Likelihood.hidden`.
    """

    def __init__(
        self, likelihood: Likelihood, weights: NDArray[np.float64], layer: int, name: str = "linear_probe"
    ) -> None:
        self.likelihood, self.weights, self.layer = likelihood, weights, layer
        self.__name__ = name

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """Score each sample; 0 for an empty response."""
        found: list[float] = (self.likelihood.hidden(completions, prompts, self.layer) @ self.weights).tolist()
        return found


def fit_probe(
    difference: NDArray[np.float64], preferred: NDArray[np.float64], group: NDArray[np.int64], folds: int = 5
) -> NDArray[np.float64]:
    """Return weights ``(d,)`` by which ``P(first over second) = sigmoid(w . (h_first - h_second))``, the model of
    Bradley and Terry, with a normal prior on w whose width is the best of a few by cross-validated likelihood.

    Args:
        difference: ``h_first - h_second`` of N pairs, ``(N, d)``.
        preferred: the share of annotators who chose the first, ``(N,)`` in [0, 1].
        group: ``(N,)``; pairs of one group, such as a prompt's, are in the same fold.
        folds: at most; not more than there are groups.

    Raises:
        ValueError: less than two groups.
    """
    names, number = np.unique(group, return_inverse=True)
    folds = min(folds, len(names))
    if folds < 2:
        raise ValueError("a linear probe needs pairs of two prompts at least, to choose its prior by cross-validation")
    scale = difference.std(axis=0) + 1e-9
    x, fold = difference / scale, number % folds
    losses = []
    for penalty in _PENALTIES:
        held = [
            _loss(x[fold == k], preferred[fold == k], _newton(x[fold != k], preferred[fold != k], penalty))
            for k in range(folds)
        ]
        losses.append(sum(held))
    weights: NDArray[np.float64] = _newton(x, preferred, _PENALTIES[int(np.argmin(losses))]) / scale
    return weights


def _newton(x: NDArray[np.float64], y: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    """The minimum of the negative log-likelihood and ``penalty / 2 |w|^2``."""
    weights = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        p = expit(x @ weights)
        gradient = x.T @ (p - y) + penalty * weights
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _loss(x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    margin = x @ weights
    return float((np.logaddexp(0.0, margin) - y * margin).sum())
