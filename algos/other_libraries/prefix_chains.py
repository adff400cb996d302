"""Steps of the same texts, stored one by one in any order, put together again: a text's steps are prefixes of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Chains(NamedTuple):
    """Texts that hold all steps.

    Attributes:
        texts: ``(L, P + T)`` int64, none a prefix of another; ``L <= N``.
        row: ``(N,)`` int64, the text that holds each step.
        position: ``(N,)`` int64, which of its response tokens is the step's action.
    """

    texts: NDArray[np.int64]
    row: NDArray[np.int64]
    position: NDArray[np.int64]


def prefix_chains(obs: NDArray[np.int64], actions: NDArray[np.int64], prompt_length: int) -> Chains:
    """The fewest texts whose prefixes are all the given steps.

    Args:
        obs: ``(N, P + T)`` int64, -1 where there is no token: the prompt left-padded, then the response so far.
        actions: ``(N,)`` int64, the tokens that were appended.
        prompt_length: P.

    Raises:
        ValueError: a response that has no room for its action.
    """
    position = (obs[:, prompt_length:] >= 0).sum(axis=1)
    if (position >= obs.shape[1] - prompt_length).any():
        raise ValueError(f"step {int(position.argmax())} acts after its response is full")
    texts = obs.copy()
    texts[np.arange(len(obs)), prompt_length + position] = actions
    return Chains(*shared_texts(texts, prompt_length), position)


def shared_texts(texts: NDArray[np.int64], prompt_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The texts that begin no other one.

    Sorted as words in a dictionary, a text that is a prefix of any other stands right before one that it is a prefix
    of. So each belongs to the end of its run of prefixes, and one forward of those ends serves all.

    Args:
        texts: ``(N, P + T)`` int64, -1 where there is no token: the prompt left-padded, then the response.
        prompt_length: P.

    Returns:
        ``(L, P + T)`` those texts, each once, and ``(N,)`` int64, which of them each text begins or is.
    """
    end = prompt_length + (texts[:, prompt_length:] >= 0).sum(axis=1)
    # Big-endian bytes compare as the numbers do; no token is 0 and comes before all.
    words = np.ascontiguousarray((texts + 1).astype(">u4")).view(f"S{4 * texts.shape[1]}").ravel()
    order = words.argsort(kind="stable")
    ordered = texts[order]
    behind = np.arange(texts.shape[1]) >= end[order[:-1], None]
    is_prefix = ((ordered[:-1] == ordered[1:]) | behind).all(axis=1)
    last = np.append(~is_prefix, True)
    row = np.empty(len(texts), dtype=np.int64)
    row[order] = last.cumsum() - last
    return ordered[last], row
