"""A model's cache by rows: each row holds a text, can be dropped or replaced, and grows in place.

Every row's tokens stand at the right end of the columns, so distances of columns are distances of tokens, as sliding
windows and relative positions need, and the only mask hides columns on the left.
"""

from __future__ import annotations

from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from lm_envs.model.step_threads import StepThreads
from lm_envs.model.tokens import accepted, model_inputs, names_argument, right_align

RECOMPUTE = "_lm_envs_recompute"  # the attribute of a model that is used without a cache
ROOM = 16  # the fewest free columns of a new buffer


class RowLayer:
    """Operations on rows that transformers' layers lack; no-ops for a layer without memory."""

    def hold(self, rows: Tensor) -> None:
        """Prepare a step in which these rows stand still."""

    def release(self, rows: Tensor) -> None:
        """Undo that step's effect on these rows."""

    def put(self, rows: Tensor, other: Any) -> None:
        """Replace rows by another layer's, which has no more columns."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""

    def widen(self, count: int) -> None:
        """Add columns at the left end."""

    def narrow(self, count: int) -> None:
        """Remove columns at the left end."""


class GrowingLayer(RowLayer, DynamicLayer):
    """Keys and values of one layer, ``(B, heads, columns, d)``, in buffers with room to their right.

    A new column is written in place, while ``torch.cat`` would copy all earlier ones; a full buffer is copied to one of
    twice the size. Layers with a sliding window also keep all columns; the model's mask hides old ones.
    """

    def __init__(self, room: int = ROOM) -> None:
        DynamicLayer.__init__(self)  # and not a recurrence's, which may come next
        self._room = max(room, ROOM)
        self._begin = self._end = 0
        self._buffers: list[Tensor] = []  # keys and values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append columns; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states, count = (key_states, value_states), key_states.shape[-2]
        if not self._buffers or self._end + count > self._buffers[0].shape[-2]:
            self._grow(states, count)
        for buffer, new in zip(self._buffers, states, strict=True):
            buffer[:, :, self._end : self._end + count] = new
        self._end += count
        return self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, self._begin : self._end] for buffer in self._buffers)
        return self.keys, self.values

    def _grow(self, states: tuple[Tensor, Tensor], count: int) -> None:
        held = self._end - self._begin
        # The first columns are a prompt's, whose forward needs memory itself: room for others is made later.
        room = max(count, self._room, held) if self._buffers else count
        made = [new.new_empty(*new.shape[:2], held + room, new.shape[-1]) for new in states]
        for buffer, old in zip(made, self._buffers, strict=bool(self._buffers)):
            buffer[:, :, :held] = old[:, :, self._begin : self._end]
        self._buffers, self._begin, self._end = made, 0, held

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._buffers:
            self._buffers = [buffer[indices] for buffer in self._buffers]
            self._show()

    def release(self, rows: Tensor) -> None:
        """Move these rows a column to the right, over their new column."""
        for x in (self.keys, self.values):
            x[rows, :, 1:] = x[rows, :, :-1]  # indexing by a tensor copies first

    def put(self, rows: Tensor, other: Any) -> None:
        width = other.keys.shape[-2]
        self.keys[rows, :, -width:] = other.keys
        self.values[rows, :, -width:] = other.values

    def widen(self, count: int) -> None:
        if self._begin < count:
            self._buffers = [F.pad(buffer, (0, 0, count - self._begin, 0)) for buffer in self._buffers]
            self._begin, self._end = count, self._end + count - self._begin
        self._begin -= count
        for buffer in self._buffers:
            # The memory may hold NaN, and a masked column is multiplied by zero: zero times NaN is NaN.
            buffer[:, :, self._begin : self._begin + count] = 0
        self._show()

    def narrow(self, count: int) -> None:
        self._begin += count
        self._show()


class StateLayer(RowLayer, LinearAttentionLayer):
    """The states of a layer's convolution and recurrence, each a row's whole past."""

    def _states(self) -> list[Tensor]:
        return [x for held in (self.conv_states, self.recurrent_states) for x in held.values() if x is not None]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for held in (self.conv_states, self.recurrent_states):
            for name, x in held.items():
                held[name] = None if x is None else x[indices]

    def hold(self, rows: Tensor) -> None:
        self._held = [x[rows] for x in self._states()]

    def release(self, rows: Tensor) -> None:
        super().release(rows)
        for x, held in zip(self._states(), self._held, strict=True):
            x[rows] = held

    def put(self, rows: Tensor, other: Any) -> None:
        super().put(rows, other)
        for x, new in zip(self._states(), other._states(), strict=True):
            x[rows] = new


class BothLayer(StateLayer, GrowingLayer):
    """Keys and values beside a recurrence's state, in one layer."""

    def __init__(self, room: int = ROOM) -> None:
        GrowingLayer.__init__(self, room)
        StateLayer.__init__(self)

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:
        """Initialize the keys and values, which come by position, or a state, which comes by name."""
        kind = GrowingLayer if keys_and_values else StateLayer
        kind.lazy_initialization(self, *keys_and_values, **states)


class EmptyLayer(RowLayer, DummyLayer):
    """A layer without memory, or one that reads another layer's."""


_OURS: dict[type, type] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingLayer,
    LinearAttentionLayer: StateLayer,
    LinearAttentionAndFullAttentionLayer: BothLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: BothLayer,
    DummyLayer: EmptyLayer,
}


def layer_types(model: PreTrainedModel) -> list[type] | None:
    """Return our layer for each of the model's, None if one does not let rows be exchanged: chunked attention, whose
    windows begin at fixed columns, or a kind of cache that is unknown here."""
    config = model.config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return None
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, ValueError):
        return None
    found = [_OURS.get(type(layer)) for layer in layers]
    return [kind for kind in found if kind is not None] if found and all(found) else None


def can_cache(model: PreTrainedModel) -> bool:
    """Whether this model works with a :class:`RowCache` and is not marked for use without a cache."""
    return not getattr(model, RECOMPUTE, False) and _argument(model) is not None and layer_types(model) is not None


def no_rows(model: PreTrainedModel) -> str:
    """Return the message about a model for which :func:`can_cache` is False."""
    return (
        f"the cache of {model.config.model_type} cannot be kept row by row, so each token would take a forward of its "
        "whole text; allow that with recompute=True (--recompute on the command line), or use another family"
    )


def _argument(model: PreTrainedModel) -> str | None:
    return next((name for name in ("past_key_values", "cache_params") if names_argument(model, name)), None)


class RowCache:
    """Cache of B rows that grow by a token a step.

    Args:
        model: one for which :func:`can_cache` holds.
        room: the expected number of tokens after the first ones.
    """

    def __init__(self, model: PreTrainedModel, room: int = ROOM) -> None:
        self.model, self._room = model, room
        types, argument = layer_types(model), _argument(model)
        if types is None or argument is None:
            raise ValueError(f"rows of a {type(model).__name__}'s cache cannot be exchanged one by one")
        self._types, self._argument = types, argument
        # A recurrence has no past to mask, and its new tokens are all real.
        self._masked = any(issubclass(kind, GrowingLayer) for kind in types)
        self.columns = 0

    @torch.no_grad()
    def prefill(self, obs: Tensor) -> Tensor:
        """Restart all rows with ``obs (B, L)``, contiguous tokens with -1 elsewhere; return logits ``(B, V)``."""
        obs = right_align(obs)
        self.cache = self._new_cache()
        self.lengths = (obs >= 0).sum(dim=1)  # (B,)
        self.columns = obs.shape[1]
        self._find_padding()
        return self._forward(**model_inputs(obs), logits_to_keep=1)

    @cached_property
    def _threads(self) -> StepThreads:
        return StepThreads(self.model)

    def _new_cache(self) -> Cache:
        return Cache(layers=[kind(self._room) if issubclass(kind, GrowingLayer) else kind() for kind in self._types])

    def _forward(self, **inputs: Tensor | int | None) -> Tensor:
        given = {name: x for name, x in inputs.items() if x is not None}
        given[self._argument] = self.cache
        return self.model(**accepted(self.model, **given, use_cache=True)).logits[:, -1]

    def _find_padding(self) -> None:
        """Count the columns that the shortest and the longest row leave empty; steps do not change them."""
        longest, shortest = (int(x) for x in torch.stack([self.lengths.max(), self.lengths.min()]))
        self._padded, self._dead = self.columns - shortest, self.columns - longest

    @torch.no_grad()
    def advance(self, tokens: Tensor, standing: Tensor | None = None) -> Tensor:
        """Add a token, ``(B,)`` int64, to each row; return logits ``(B, V)``.

        Rows whose indices are in ``standing`` stand still: their token may be any, and their logits are meaningless.
        """
        if standing is not None:
            for layer in self.cache.layers:
                layer.hold(standing)
        self.columns += 1
        mask = None
        if self._padded and self._masked:
            begin = self.columns - 1 - self.lengths
            mask = torch.arange(self.columns, device=tokens.device) >= begin.unsqueeze(1)
        with self._threads.use(len(tokens)):
            position = self.lengths.unsqueeze(1)
            logits = self._forward(input_ids=tokens.unsqueeze(1), attention_mask=mask, position_ids=position)
        self.lengths = self.lengths + 1
        if standing is not None:
            for layer in self.cache.layers:
                layer.release(standing)
            self.lengths[standing] -= 1
            self._find_padding()
        return logits

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        for layer in self.cache.layers:
            layer.batch_select_indices(rows)
        self.lengths = self.lengths[rows]
        self._trim()

    def refill(self, rows: Tensor, obs: Tensor) -> Tensor:
        """Replace the texts of some rows by ``obs``, as in :meth:`prefill`; return logits ``(len(rows), V)``."""
        fresh = copy(self)
        logits = fresh.prefill(obs)  # gives it a cache of its own
        if fresh.columns > self.columns:
            for layer in self.cache.layers:
                layer.widen(fresh.columns - self.columns)
            self.columns = fresh.columns
        self._put(rows, fresh)
        self._trim()
        return logits

    def _put(self, rows: Tensor, other: RowCache) -> None:
        for layer, new in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.put(rows, new)
        self.lengths[rows] = other.lengths

    def _trim(self) -> None:
        """Remove the columns that no row uses."""
        self._find_padding()
        if self._dead:
            for layer in self.cache.layers:
                layer.narrow(self._dead)
            self.columns -= self._dead
            self._padded, self._dead = self._padded - self._dead, 0
