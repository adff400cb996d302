"""Incremental decoding: next-token logits of many rows with one forward a step, and sampling by inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lm_envs.kernels.logprob_kl import log_softmax
from lm_envs.observations import accepted, model_inputs


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether every layer keeps all keys and values, so that rows can be cut, dropped and refilled."""
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, ValueError):
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def sample(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sample by inverse CDF: the token whose interval of the cumulative distribution holds the uniform.

    Args:
        logits: ``(N, V)``; -inf excludes a token.
        uniforms: ``(N,)`` float64 in [0, 1).
        temperature: divides the logits.

    Returns:
        tokens ``(N,)`` int64 and their log-probabilities ``(N,)``.
    """
    log_p = log_softmax(logits, temperature)
    cdf = log_p.double().exp().cumsum(dim=-1)  # float64: rounding of a float32 sum would starve late tokens
    total = cdf[:, -1:]
    # Strictly below the total, so that a token without probability cannot be hit.
    target = torch.minimum(uniforms.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cdf, target, right=True)
    return tokens.squeeze(-1), log_p.gather(-1, tokens).squeeze(-1)


def forbid_early_eos(logits: Tensor, position: Tensor | int, eos_token_id: int, min_new_tokens: int) -> Tensor:
    """Logits with EOS at -inf where fewer than ``min_new_tokens`` tokens stand before it.

    Args:
        logits: ``(..., V)``.
        position: how many response tokens precede, an int or a tensor that broadcasts to ``logits.shape[:-1]``.
    """
    if min_new_tokens <= 0:
        return logits
    early = torch.as_tensor(position, device=logits.device) < min_new_tokens
    if not bool(early.any()):
        return logits
    eos = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    eos[eos_token_id] = True
    return logits.masked_fill(early.unsqueeze(-1) & eos, float("-inf"))


class RowCache:
    """Key-value cache of B rows that grow a column a step; a column may be dead (masked) in any row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache()
        self.live = torch.zeros(0, 0, dtype=torch.bool)  # (B, columns)

    @torch.no_grad()
    def prefill(self, obs: Tensor) -> Tensor:
        """Start all rows anew. ``obs`` is ``(B, L)`` with every row's last token in the last column; logits ``(B,
        V)``."""
        inputs = model_inputs(obs)
        self.cache = DynamicCache()
        out = self.model(**accepted(self.model, **inputs, logits_to_keep=1), past_key_values=self.cache, use_cache=True)
        self.live = obs >= 0
        return out.logits[:, -1]

    @torch.no_grad()
    def advance(self, tokens: Tensor, moving: Tensor | None = None) -> Tensor:
        """One more token per row.

        Args:
            tokens: ``(B,)`` int64; anything where the row does not move.
            moving: ``(B,)`` bool, or None for all; a row that stands still gets a dead column.

        Returns:
            logits ``(B, V)``, meaningless where the row stood still.
        """
        position = self.live.sum(dim=1, keepdim=True)
        column = torch.ones_like(tokens, dtype=torch.bool) if moving is None else moving
        self.live = torch.cat([self.live, column.unsqueeze(1)], dim=1)
        out = self.model(
            input_ids=tokens.clamp(min=0).unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
            **accepted(self.model, attention_mask=self.live.long(), position_ids=position),
        )
        return out.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.cache.batch_select_indices(rows)
        self.live = self.live[rows]

    def refill(self, rows: Tensor, obs: Tensor) -> Tensor:
        """Put other texts in the place of some rows; logits ``(len(rows), V)``. ``obs`` as in :meth:`prefill`."""
        fresh = RowCache(self.model)
        logits = fresh.prefill(obs)
        columns, width = self.live.shape[1], obs.shape[1]
        if width > columns:
            self._pad_left(width - columns)
            columns = width
        for layer, new in zip(self.cache.layers, fresh.cache.layers, strict=True):
            layer.keys[rows, :, columns - width :] = new.keys
            layer.values[rows, :, columns - width :] = new.values
        self.live[rows] = False
        self.live[rows, columns - width :] = fresh.live
        return logits

    def _pad_left(self, count: int) -> None:
        for layer in self.cache.layers:
            layer.keys = torch.nn.functional.pad(layer.keys, (0, 0, count, 0))
            layer.values = torch.nn.functional.pad(layer.values, (0, 0, count, 0))
        self.live = torch.nn.functional.pad(self.live, (count, 0))

    def trim(self) -> None:
        """Forget the leading columns that are dead in every row."""
        dead = int((self.live.any(dim=0).cumsum(0) == 0).sum())
        if dead:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, dead:], layer.values[:, :, dead:]
            self.live = self.live[:, dead:]


def _right_align(obs: Tensor) -> Tensor:
    """Shift every row so that its last token stands in the last column, and cut what no row needs. ``(B, L)``."""
    present = obs >= 0
    columns = torch.arange(obs.shape[1], device=obs.device)
    last = (present * (columns + 1)).amax(dim=1)  # (B,) one past the last token
    width = int(present.sum(dim=1).max())
    source = last.unsqueeze(1) - width + torch.arange(width, device=obs.device)
    aligned = obs.gather(1, source.clamp(min=0))
    return aligned.masked_fill(source < 0, -1)


class Decoder:
    """Next-token logits for rows that the caller may extend, swap or restart at any time.

    It compares each observation with the last one it saw: rows that grew by one token take one cached step together,
    all others are computed anew. Callers never manage a cache and cannot get a stale answer. A model whose layers do
    not keep all keys and values (sliding windows, recurrent states) is computed in full each time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cached = has_plain_cache(model)
        self.reset()

    def reset(self) -> None:
        """Forget everything: needed after the model's weights change."""
        self._rows: RowCache | None = None
        self._obs: Tensor | None = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """Logits ``(B, V)`` after the last token of every row of ``obs`` ``(B, P + T)``, -1 where there is no token."""
        known, logits, rows = self._obs, self._logits, self._rows
        if known is None or logits is None or rows is None or known.shape != obs.shape or not self.cached:
            return self._restart(obs)
        change = known != obs
        changed = change.sum(dim=1)
        count = (obs >= 0).sum(dim=1)
        place = change.int().argmax(dim=1, keepdim=True)
        grew = (changed == 1) & (known.gather(1, place).squeeze(1) < 0) & (count == (known >= 0).sum(dim=1) + 1)
        # The one new token must be the last of its row, or what follows it in the cache is of another text.
        columns = torch.arange(obs.shape[1], device=obs.device)
        grew &= ((obs >= 0) * columns).amax(dim=1) == place.squeeze(1)
        other = (changed > 0) & ~grew
        if bool(other.all()):
            return self._restart(obs)
        if bool(grew.any()):
            rows.trim()
            stepped = rows.advance(obs.gather(1, place).squeeze(1), grew)
            logits = torch.where(grew.unsqueeze(1), stepped, logits)
        if bool(other.any()):
            index = other.nonzero().squeeze(1)
            logits = logits.index_copy(0, index, rows.refill(index, _right_align(obs[index])))
        self._obs, self._logits = obs.clone(), logits
        return logits

    def _restart(self, obs: Tensor) -> Tensor:
        self._rows = RowCache(self.model)
        self._logits = self._rows.prefill(_right_align(obs))
        self._obs = obs.clone()
        return self._logits


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Tensor,
    uniforms: Tensor,
    eos_token_id: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    min_new_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sample a response per row until EOS or the length limit; finished rows leave the batch.

    Args:
        prompts: ``(N, P)`` int64, left-padded with -1.
        uniforms: ``(N, max_new_tokens)`` float64 in [0, 1), the number each token is sampled with.

    Returns:
        response ``(N, max_new_tokens)`` int64, right-padded with -1, EOS included; logprob of the same shape, 0
        beyond the end.
    """
    count = prompts.shape[0]
    response = prompts.new_full((count, max_new_tokens), -1)
    logprob = torch.zeros(count, max_new_tokens, dtype=torch.float64 if model.dtype == torch.float64 else torch.float32)
    logprob = logprob.to(prompts.device)
    cached = has_plain_cache(model)
    rows = RowCache(model)
    active = torch.arange(count, device=prompts.device)
    logits = rows.prefill(_right_align(prompts))
    for t in range(max_new_tokens):
        tokens, token_logprob = sample(
            forbid_early_eos(logits, t, eos_token_id, min_new_tokens), uniforms[active, t], temperature
        )
        response[active, t], logprob[active, t] = tokens, token_logprob.to(logprob.dtype)
        going = tokens != eos_token_id
        if t + 1 == max_new_tokens or not bool(going.any()):
            break
        if not bool(going.all()):
            kept = going.nonzero().squeeze(1)
            active, tokens = active[kept], tokens[kept]
            if cached:
                rows.keep(kept)
        if cached:
            logits = rows.advance(tokens)
        else:
            logits = rows.prefill(_right_align(torch.cat([prompts[active], response[active, : t + 1]], dim=1)))
    return response, logprob
