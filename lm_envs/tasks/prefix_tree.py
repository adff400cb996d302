"""Numbers for all texts up to a length: the tree of prefixes on which small text environments are exact.

With n tokens besides EOS, the text ``a_1 .. a_k`` (ranks 0 .. n-1) has the number ``f(a_1 .. a_k) = n f(a_1 .. a_{k-1})
+ 1 + a_k`` and the empty text 0, as in a heap: by length, then lexicographically. A text shorter than the horizon T is
a **prefix**, a state in which a token is chosen; there are ``S = (n^T - 1) / (n - 1)``. A **sequence** is what an
episode can end with: a prefix and EOS, which has the prefix's number, or T tokens without EOS, which have the numbers
from S on; there are ``S + n^T``. With 5 tokens and horizon 5: 781 prefixes, 3,906 sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SEQUENCES = 2_000_000


class PrefixTree:
    """All texts over a vocabulary of V tokens, EOS included, up to a horizon of T tokens.

    The ids besides EOS in their order have the ranks 0 .. V-2.

    Attributes:
        arity: n = V - 1.
        prefixes, sequences: how many there are.

    Raises:
        ValueError: an argument out of range, or more than :data:`MAX_SEQUENCES` sequences.
    """

    def __init__(self, vocab_size: int, eos_token_id: int, horizon: int) -> None:
        if vocab_size < 3 or not 0 <= eos_token_id < vocab_size:
            raise ValueError(
                f"a prefix tree needs two tokens besides EOS, and EOS among them, got {vocab_size} tokens with EOS "
                f"{eos_token_id}"
            )
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        self.vocab_size, self.eos_token_id, self.horizon = vocab_size, eos_token_id, horizon
        self.arity = vocab_size - 1
        self.prefixes = sum(self.arity**k for k in range(horizon))
        self.sequences = self.prefixes + self.arity**horizon
        if self.sequences > MAX_SEQUENCES:
            raise ValueError(
                f"{self.arity} tokens and a horizon of {horizon} make {self.sequences:,} sequences, more than the "
                f"{MAX_SEQUENCES:,} that are enumerated: use fewer tokens or a shorter horizon"
            )
        self.tokens = torch.tensor([i for i in range(vocab_size) if i != eos_token_id])
        """``(n,)`` int64, token ids by rank."""

    def level(self, length: int) -> slice:
        """The numbers of the texts of a length."""
        start = sum(self.arity**k for k in range(length))
        return slice(start, start + self.arity**length)

    def states(self, response: Tensor) -> Tensor:
        """The prefix before each token, and the text after the last.

        Args:
            response: ``(..., t)`` int64, right-padded with -1, at most T tokens, EOS included.

        Returns:
            ``(..., t + 1)`` int64 numbers; padding and EOS change nothing, so the last column is the sequence's number.
        """
        text = (response >= 0) & (response != self.eos_token_id)
        rank = response - (response > self.eos_token_id).long()
        state = response.new_zeros(response.shape[:-1])
        columns = [state]
        for t in range(response.shape[-1]):
            state = torch.where(text[..., t], state * self.arity + 1 + rank[..., t], state)
            columns.append(state)
        return torch.stack(columns, dim=-1)

    def texts(self) -> Tensor:
        """``(sequences, T)`` int64, the tokens of every text by its number, right-padded with -1, without EOS."""
        parts = []
        for length in range(self.horizon + 1):
            place = torch.arange(self.arity**length)
            digits = [place // self.arity ** (length - 1 - t) % self.arity for t in range(length)]
            level = torch.full((len(place), self.horizon), -1)
            if digits:
                level[:, :length] = self.tokens[torch.stack(digits, dim=1)]
            parts.append(level)
        return torch.cat(parts)

    def responses(self) -> Tensor:
        """``(sequences, T)`` int64, the same with the EOS that a sequence ends in."""
        found = self.texts()
        rows = torch.arange(self.prefixes)
        found[rows, (found[: self.prefixes] >= 0).sum(dim=1)] = self.eos_token_id
        return found
