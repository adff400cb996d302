"""The observation of a text environment, and the inputs of a transformers model for it.

One row is ``P + T`` int64: P places of prompt, left-padded, then T of response, right-padded; -1 is no token. So the
text is contiguous, the prompt always ends at place P, and masks come from places, never from pad ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TOKEN = -1

EosIds = int | tuple[int, ...]  # the tokens that end a response: chat models have several


def model_inputs(obs: Tensor) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` (1 on tokens) and ``position_ids`` (``cumsum(mask) - 1``, clamped at 0),
    ``(B, L)`` each, for ``obs (B, L)`` int64, -1 where there is no token."""
    present = (obs >= 0).long()
    return {
        "input_ids": obs.clamp(min=0),
        "attention_mask": present,
        "position_ids": (present.cumsum(dim=1) - 1).clamp(min=0),
    }


@lru_cache(maxsize=256)
def _parameters(forward: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def accepted(model: nn.Module, **arguments: object) -> dict[str, object]:
    """Return the keyword arguments that the model's ``forward`` names (BLOOM has no ``position_ids``)."""
    names = _parameters(type(model).forward)
    return {name: value for name, value in arguments.items() if name in names}


def names_argument(model: nn.Module, name: str) -> bool:
    """Whether the model's ``forward`` names the argument."""
    return name in _parameters(type(model).forward)


def context_of(model: nn.Module) -> int | None:
    """Return the most tokens that a model reads at once, None if its config does not say.

    RoBERTa and similar models number positions from the pad id plus 1: 514 places are 512 tokens.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator,union-attr]
    tables: list[Any] = [getattr(module, "position_embeddings", None) for module in model.modules()]
    skipped = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return None if limit is None else limit - max(skipped, default=0)


@contextmanager
def head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that receives the inputs of the model's head at each forward."""
    seen: list[Tensor] = []
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    watch = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        watch.remove()


def eos_ids(eos_token_id: EosIds) -> tuple[int, ...]:
    """Return the ids as a tuple."""
    return (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id


def is_eos(tokens: Tensor | NDArray[np.int64], eos_token_id: EosIds) -> Any:
    """Return which tokens end a response: bool, of the tokens' shape and kind."""
    first, *others = eos_ids(eos_token_id)
    found: Any = tokens == first
    for other in others:
        found = found | (tokens == other)
    return found


def right_align(obs: Tensor) -> Tensor:
    """Shift every row ``(B, L)`` so that its last token stands in the last column, and cut unused columns."""
    present = obs >= 0
    columns = torch.arange(obs.shape[1], device=obs.device)
    last = (present * (columns + 1)).amax(dim=1)  # (B,) one past the last token
    width = int(present.sum(dim=1).max())
    source = last.unsqueeze(1) - width + torch.arange(width, device=obs.device)
    return obs.gather(1, source.clamp(min=0)).masked_fill(source < 0, NO_TOKEN)


def left_pad(rows: Sequence[Sequence[int]], width: int) -> NDArray[np.int64]:
    """Return ``(len(rows), width)`` int64, each row at the right end, -1 before it."""
    out = np.full((len(rows), width), NO_TOKEN, dtype=np.int64)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(f"row {i} has {len(row)} tokens, more than the {width} places there are")
        if len(row):
            out[i, width - len(row) :] = row
    return out


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, stopped: bool, *, append_eos: bool = True) -> list[int]:
    """Return a text's token ids for a reward model, by its own tokenizer.

    With ``append_eos`` they end in EOS if and only if the response ended by itself (``stopped``), also with a tokenizer
    that adds one to every text.
    """
    ids: list[int] = tokenizer(text)["input_ids"]
    eos = tokenizer.eos_token_id
    if append_eos and eos is not None:
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        ids = [*ids, eos] if stopped else ids
    return ids


def same_width(*tensors: Tensor) -> list[Tensor]:
    """Return tensors ``(N_i, T_i)`` of tokens as ``(N_i, longest)``, with -1 after their rows."""
    longest = max(x.shape[1] for x in tensors)
    return [torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=NO_TOKEN) for x in tensors]


def right_pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return ``(N, longest)`` int64, each row from the left, -1 after it."""
    out = torch.full((len(rows), max(map(len, rows), default=0)), NO_TOKEN)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return out
