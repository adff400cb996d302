"""The rows of an encoder-decoder: its decoder's cache, and its encoder's states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from lm_envs.model.encoder_decoder import decoder_tokens, encoder_inputs, is_encoder_decoder
from lm_envs.model.kv_cache import RECOMPUTE, ROOM, GrowingLayer, RowCache, can_cache
from lm_envs.model.tokens import names_argument


def rows_of(model: PreTrainedModel, room: int = ROOM, response_places: int = 0) -> RowCache | None:
    """Return a cache whose rows can be exchanged, None if the model's cannot.

    Args:
        model: causal or encoder-decoder.
        room: the expected number of tokens after the first ones.
        response_places: number of places for the response at the end of an observation, for an encoder-decoder.
    """
    if is_encoder_decoder(model):
        usable = _can_place(model) and not getattr(model, RECOMPUTE, False)
        return CrossRowCache(model, room, response_places) if usable else None
    return RowCache(model, room) if can_cache(model) else None


def _can_place(model: PreTrainedModel) -> bool:
    """Whether rows of different lengths can stand at the right end of the decoder's columns: positions are distances
    (T5), or a module looks them up (BART)."""
    relative = getattr(model.config, "relative_attention_num_buckets", None) is not None
    return relative or _position_table(model) is not None


def _position_table(model: PreTrainedModel) -> nn.Module | None:
    table = getattr(model.get_decoder(), "embed_positions", None)
    return table if table is not None and names_argument(table, "position_ids") else None


@contextmanager
def _placed(table: nn.Module | None, position_ids: Tensor, columns: int) -> Iterator[None]:
    """Use the position embeddings of ``position_ids (B, L)``, all below ``columns``, in the decoder.

    Such decoders count from the cache's length, which is a row's length only if all lengths are equal.
    """
    if table is None:
        yield
        return
    every = torch.arange(columns, device=position_ids.device)

    def look_up(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = module.forward(args[0], position_ids=every)
        return rows.reshape(-1, output.shape[-1])[position_ids]

    hook = table.register_forward_hook(look_up)
    try:
        yield
    finally:
        hook.remove()


class CrossRowCache(RowCache):
    """Cache of B rows of an encoder-decoder that grow by a token a step; the arguments are those of :func:`rows_of`.

    The base class holds the decoder's text: the start token and the response. This one adds the encoder's states, and
    their keys and values in the decoder's cross-attention, with S columns padded on the right.
    """

    def __init__(self, model: PreTrainedModel, room: int = ROOM, response_places: int = 0) -> None:
        self.model, self._room, self._places = model, room, response_places
        # The decoder makes its layers when it fills them.
        self._types, self._masked = [], True
        self.columns = 0

    @torch.no_grad()
    def prefill(self, obs: Tensor) -> Tensor:
        """Restart all rows with ``obs (B, P + response_places)``, the prompt left-padded and the response right-padded
        with -1; return logits ``(B, V)``."""
        prompt, response = obs.split([obs.shape[1] - self._places, self._places], dim=1)
        inputs = encoder_inputs(prompt)
        self._mask = inputs["attention_mask"]
        self._states = self.model.get_encoder()(**inputs).last_hidden_state
        self._cross = DynamicCache()
        return super().prefill(decoder_tokens(self.model, response))

    def _new_cache(self) -> Cache:
        return Cache(layer_class_to_replicate=partial(GrowingLayer, self._room))

    def _forward(self, **inputs: Any) -> Tensor:
        table = _position_table(self.model) if self._padded else None
        with _placed(table, inputs["position_ids"], self.columns):
            found = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=self._states),
                attention_mask=self._mask,
                decoder_input_ids=inputs["input_ids"],
                decoder_attention_mask=inputs["attention_mask"],
                past_key_values=EncoderDecoderCache(self.cache, self._cross),
                use_cache=True,
            )
        return found.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self._mask, self._states = self._mask[rows], self._states[rows]
        for layer in self._crossed:
            layer.batch_select_indices(rows)

    @property
    def _crossed(self) -> list[DynamicLayer]:
        return cast("list[DynamicLayer]", self._cross.layers)

    def _put(self, rows: Tensor, other: RowCache) -> None:
        super()._put(rows, other)
        assert isinstance(other, CrossRowCache)
        self._mask = _replaced(self._mask, rows, other._mask, dim=1)
        self._states = _replaced(self._states, rows, other._states, dim=1)
        for layer, new in zip(self._crossed, other._crossed, strict=True):
            layer.keys = _replaced(layer.keys, rows, new.keys, dim=2)
            layer.values = _replaced(layer.values, rows, new.values, dim=2)


def _replaced(held: Tensor, rows: Tensor, new: Tensor, dim: int) -> Tensor:
    """Return ``held`` with other rows in these places, both padded with zeros to the wider one's columns."""
    width = max(held.shape[dim], new.shape[dim])
    # Zeros, because a masked column is multiplied by zero, and zero times NaN is NaN.
    held, new = (F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, width - x.shape[dim])) for x in (held, new))
    return held.index_copy(0, rows, new)
