"""What a language model thinks of texts: mean log-probabilities of their tokens, and hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lm_envs.model.forwards import response_logprob, rows_at_once
from lm_envs.model.text import Codec
from lm_envs.model.tokens import accepted, context_of, left_pad, right_pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_ROWS = 64  # texts of similar length that are read at a time
WORST = -10.0
"""Nats a token: the mean log-probability of a text without any fluency."""


def fluency(likelihood: Likelihood, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return ``1 + m / 10``, at least 0, with m the mean log-probability of a text's tokens in nats, for a model that
    sees the text alone; 0 for a text of less than two tokens. ``(N,)``."""
    return np.maximum(0.0, 1 - np.nan_to_num(likelihood.mean(texts), nan=WORST) / WORST)


class Likelihood:
    """A frozen causal language model that scores texts.

    Args:
        model: any that the library reads.
        tokenizer: the model's own.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._codec, self._longest = Codec(tokenizer, model), context_of(model) or 2**20

    @torch.no_grad()
    def mean(self, texts: Sequence[str], contexts: Sequence[str] | None = None) -> NDArray[np.float64]:
        """Return ``mean_t log p(text_t | context, text_<t)``, ``(N,)`` nats a token; without a context the first token
        is given. NaN for a text with no token to score."""
        given: list[list[int]] = []
        scored: list[list[int]] = []
        for text, context in zip(texts, contexts or [""] * len(texts), strict=True):
            if context:
                before, ids = self._codec.encode(context)[0], self._ids(text)
            else:
                before, ids = self._ids(text)[:1], self._ids(text)[1:]
            ids = ids[: self._longest - 1]
            given.append(before[max(0, len(before) + len(ids) - self._longest) :])
            scored.append(ids)
        found = np.full(len(scored), np.nan)
        known = [i for i, ids in enumerate(scored) if ids]
        if known:
            prompt = torch.from_numpy(left_pad([given[i] for i in known], max(len(given[i]) for i in known)))
            response = right_pad([scored[i] for i in known])
            device = self.model.device
            logprob = response_logprob(self.model, prompt.to(device), response.to(device), ())
            found[known] = (logprob.sum(dim=1) / (response >= 0).sum(dim=1).to(device)).double().cpu().numpy()
        return found

    @torch.no_grad()
    def hidden(
        self, texts: Sequence[str], contexts: Sequence[str] | None = None, layer: int = -1
    ) -> NDArray[np.float64]:
        """Return the mean over a text's tokens of the hidden states after a layer, ``(N, d)``; zeros for an empty text.

        Args:
            contexts: what stands before each text; its tokens are read and do not enter the mean.
            layer: as transformers counts ``hidden_states``: 0 is the embeddings, -1 the last, after its norm.
        """
        before, rows = self._split(texts, contexts)
        known = [i for i, ids in enumerate(rows) if ids]
        found = np.zeros((len(rows), self.model.config.hidden_size))
        trunk = self.model.base_model
        known.sort(key=lambda i: len(before[i]) + len(rows[i]))
        start = 0
        while start < len(known):
            some = known[start : start + _ROWS]
            widest = len(before[some[-1]]) + len(rows[some[-1]])
            some = some[: rows_at_once(widest, self.model.device)]
            start += len(some)
            ids = right_pad([before[i] + rows[i] for i in some]).to(self.model.device)
            places = torch.arange(ids.shape[1], device=ids.device)
            mask = (ids >= 0) & (places >= torch.tensor([[len(before[i])] for i in some], device=ids.device))
            inputs = {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(), "use_cache": False}
            states = trunk(**accepted(trunk, **inputs), output_hidden_states=True).hidden_states[layer]
            states = states * mask[..., None]
            found[some] = (states.sum(dim=1) / mask.sum(dim=1, keepdim=True)).double().cpu().numpy()
        return found

    def _split(self, texts: Sequence[str], contexts: Sequence[str] | None) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens of the contexts, as much of their ends as fits, and of the texts."""
        rows = [self._ids(text)[: self._longest] for text in texts]
        before = [self._codec.encode(context)[0] if context else [] for context in contexts or [""] * len(rows)]
        return [b[max(0, len(b) + len(ids) - self._longest) :] for b, ids in zip(before, rows, strict=True)], rows

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text.strip() else []
