"""A reward of each sentence of a response, paid where the sentence ends or all at the end (Wu et al. 2023, Fine-grained
human feedback gives better rewards for language model training, arXiv:2306.01693)."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.reward.base import AnyReward, reward_name, scores_or_nan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"')\]]*(?=\s|$)|(?=\n)|$)")


def sentences(text: str) -> list[tuple[int, int]]:
    """Return where the sentences of a text begin and end. One ends with a full stop, a question or an exclamation mark,
    with its line, or with the text."""
    return [match.span() for match in _SENTENCE.finditer(text)]


class PerSentence:
    """A reward that scores each sentence as if it were a whole response, with the sentences before it as the column
    ``earlier``.

    Args:
        reward: any that gives one number per sample; where it does not apply a sentence gets 0.
        tokenizer: the policy's, which tells with which token a sentence ends.
        name: the name in metrics; the reward's own if None.
        dense: pay each sentence with its last token; False pays the sum with the response's last one.
        most: sentences that count, the first ones; None for all.
    """

    def __init__(
        self,
        reward: AnyReward,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        *,
        dense: bool = True,
        most: int | None = None,
    ) -> None:
        self.reward, self.tokenizer, self.dense, self.most = reward, tokenizer, dense, most
        self.__name__ = name or reward_name(reward)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        finish_reasons: Sequence[str],
        **columns: Sequence[Any],
    ) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """Score responses: one number each, or one per token."""
        paid = [np.zeros(len(ids)) for ids in completion_ids]
        places: list[tuple[int, int]] = []  # sample, and the sentence's last token
        given: dict[str, list[Any]] = {
            name: [] for name in ("completions", "completion_ids", "finish_reasons", "earlier")
        }
        for i, (text, ids) in enumerate(zip(completions, completion_ids, strict=True)):
            spans = sentences(text)
            texts, first = [text[start:end] for start, end in spans], 0
            for k, (_, end) in enumerate(spans[: self.most]):
                last = max(self._token(text, ids, end), first)
                whole = end < len(text.rstrip()) or finish_reasons[i] == "stop"
                row = (texts[k], list(ids[first : last + 1]), "stop" if whole else "length", texts[:k])
                for name, value in zip(given, row, strict=True):
                    given[name].append(value)
                places.append((i, last))
                first = min(last + 1, len(ids) - 1)
        if places:
            samples = [i for i, _ in places]
            given |= {name: [values[i] for i in samples] for name, values in {"prompts": prompts, **columns}.items()}
            scores = scores_or_nan(self.reward, given)
            if scores.ndim == 2:
                raise ValueError(
                    f"reward {self.__name__!r} pays per token: one that scores sentences gives one number each"
                )
            for (i, last), score in zip(places, np.nan_to_num(scores), strict=True):
                paid[i][last] += score
        return paid if self.dense else np.array([each.sum() for each in paid])

    def _token(self, text: str, ids: Sequence[int], end: int) -> int:
        """The number of the token that writes the character before ``end``."""
        lengths = _Lengths(self.tokenizer, ids)
        # A tokenizer may drop a space at the beginning where the text, decoded with its prompt, has one.
        return min(bisect.bisect_left(lengths, end - (len(text) - lengths[len(ids) - 1])), len(ids) - 1)


class _Lengths(Sequence[int]):
    """The number of characters that the first tokens write, decoded only where it is looked up."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
        self.tokenizer, self.ids = tokenizer, list(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, last: Any) -> Any:
        return len(self.tokenizer.decode(self.ids[: last + 1], skip_special_tokens=True))
