"""Incremental decoding: next-token logits of many rows by one forward a step, and sampling by inverse CDF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lm_envs.kernels.logprob_kl import scaled
from lm_envs.kernels.threads import at_most, waking_is_slow
from lm_envs.model.compiled import FixedRows
from lm_envs.model.encoder_decoder import is_encoder_decoder, teacher_forced
from lm_envs.model.kv_cache import RowCache
from lm_envs.model.kv_cache_cross import rows_of
from lm_envs.model.tokens import EosIds, accepted, eos_ids, head_inputs, is_eos, left_pad, model_inputs, right_align

GREEDY = 1e-6  # a temperature that leaves one token, or any of those with equal logits
SHARED = {True: 2**19, False: 2**15}  # the fewest logits per thread, by whether waking one is slow
WHOLE = 2**11  # vocabularies up to this size take one cumulative sum and search, larger ones two
BLOCK = 64  # tokens whose probabilities are summed before the search, as a cumulative sum of all is slow


def sample(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sample by inverse CDF: the token whose interval of the cumulative distribution holds the uniform.

    Args:
        logits: ``(N, V)``; -inf excludes a token. ``temperature`` divides them.
        uniforms: ``(N,)`` float64 in [0, 1).

    Returns:
        tokens ``(N,)`` int64 and their log-probabilities ``(N,)``.
    """
    with at_most(max(1, logits.numel() // SHARED[waking_is_slow()])):
        return _sample(scaled(logits, temperature), uniforms)


def _sample(x: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    count, vocabulary = x.shape
    highest = x.amax(dim=-1, keepdim=True)
    # Sums are in float64: the rounding of a float32 sum would starve late tokens.
    if vocabulary <= WHOLE:
        cdf = (x - highest).exp_().cumsum(dim=-1, dtype=torch.float64)
        total = cdf[:, -1:]
        tokens = torch.searchsorted(cdf, _below(uniforms.unsqueeze(-1) * total, total), right=True)
    else:
        weight = x.new_empty(count, -(-vocabulary // BLOCK), BLOCK)
        flat = weight.view(count, -1)
        torch.sub(x, highest, out=flat[:, :vocabulary]).exp_()
        flat[:, vocabulary:] = 0
        # Within a block, a float32 sum is exact enough.
        blocks = weight.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        total = blocks[:, -1:]
        target = _below(uniforms.unsqueeze(-1) * total, total)
        block = torch.searchsorted(blocks, target, right=True)
        rest = target - blocks.gather(-1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
        chosen = weight.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)
        inner = chosen.cumsum(dim=-1, dtype=torch.float64)
        tokens = block * BLOCK + torch.searchsorted(inner, _below(rest, inner[:, -1:]), right=True)
    logprob = (x.gather(-1, tokens) - highest).squeeze(-1) - total.log().squeeze(-1).to(x.dtype)
    return tokens.squeeze(-1), logprob


def _below(target: Tensor, total: Tensor) -> Tensor:
    """Keep the target below the total, so that an empty interval at the end cannot be hit."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def forbid_early_eos(
    logits: Tensor, position: Tensor | int, eos_token_id: EosIds, min_new_tokens: int, *, in_place: bool = False
) -> Tensor:
    """Return logits ``(..., V)`` with EOS at -inf where fewer than ``min_new_tokens`` tokens stand before it.

    Args:
        position: number of response tokens before, an int or a tensor that broadcasts to ``logits.shape[:-1]``.
        in_place: change ``logits`` itself; gradients stay right, because a token of probability 0 has gradient 0.
    """
    if min_new_tokens <= 0 or (isinstance(position, int) and position >= min_new_tokens):
        return logits
    if not in_place:
        logits = logits.clone()
    for token in eos_ids(eos_token_id):
        column = logits.detach()[..., token]
        if isinstance(position, int):
            column.fill_(float("-inf"))
        else:
            column.masked_fill_(position < min_new_tokens, float("-inf"))
    return logits


def keep_top(logits: Tensor, k: int) -> Tensor:
    """Set all but the ``k`` highest of each row of logits ``(..., V)`` to -inf, in place as
    :func:`forbid_early_eos`."""
    if k < logits.shape[-1]:
        values = logits.detach()
        lost = torch.ones_like(values, dtype=torch.bool).scatter_(-1, values.topk(k).indices, False)
        values.masked_fill_(lost, float("-inf"))
    return logits


class Decoder:
    """Next-token logits for rows that the caller may extend, swap or restart at any time.

    It compares each observation with the last one: rows that grew by one token take one cached step together, others
    are recomputed. A model whose rows cannot be exchanged (:func:`~lm_envs.model.kv_cache_cross.rows_of`) is computed
    in full each time.

    Args:
        model: causal or encoder-decoder.
        response_places: T, the number of an observation's places for the response; only an encoder-decoder needs it.
        hidden: also keep the hidden states behind the logits, for value heads.
    """

    def __init__(self, model: PreTrainedModel, response_places: int = 0, *, hidden: bool = False) -> None:
        self.model, self._places, self._with_hidden = model, response_places, hidden
        self.reset()

    def reset(self) -> None:
        """Forget everything; call it after the model's weights change."""
        self._rows: RowCache | None = None
        self._obs: Tensor | None = None
        self._last: tuple[Tensor, ...] | None = None
        self._ends: Tensor | None = None  # (B, 1) the places of the last tokens, where all rows grew in the last call
        self._furthest = 0  # of those

    @property
    def hidden(self) -> Tensor:
        """The hidden states of the last call, ``(B, d)``, with ``Decoder(model, hidden=True)``."""
        if self._last is None or not self._with_hidden:
            raise RuntimeError("call a Decoder(model, hidden=True) first")
        return self._last[1]

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """Return logits ``(B, V)`` after the last token of every row of ``obs (B, P + T)``, padded with -1."""
        self._last = self._next(obs)
        return self._last[0]

    def _forward(self, run: Callable[..., Tensor], *given: Any) -> tuple[Tensor, ...]:
        """Return logits and, if they are kept, hidden states of a call that ends with one forward."""
        if not self._with_hidden:
            return (run(*given),)
        with head_inputs(self.model) as seen:
            logits = run(*given)
        return logits, seen[-1][:, -1]

    def _next(self, obs: Tensor) -> tuple[Tensor, ...]:
        known, last_seen, rows = self._obs, self._last, self._rows
        if known is None or last_seen is None or rows is None or known.shape != obs.shape:
            return self._restart(obs)
        return self._grow(obs, known, rows) or self._step(obs, known, last_seen, rows)

    def _grow(self, obs: Tensor, known: Tensor, rows: RowCache) -> tuple[Tensor, ...] | None:
        """Advance all rows with few operations if each grew by a token again; else return None."""
        if self._ends is None or self._furthest + 1 >= obs.shape[1]:
            return None
        place = self._ends + 1
        last = obs.gather(1, place)
        expected = known.scatter(1, place, last)
        if not (torch.equal(expected, obs) and bool((last >= 0).all())):
            return None
        self._obs, self._ends, self._furthest = expected, place, self._furthest + 1
        return self._forward(rows.advance, last.squeeze(1))

    def _step(self, obs: Tensor, known: Tensor, last_seen: tuple[Tensor, ...], rows: RowCache) -> tuple[Tensor, ...]:
        change = known != obs
        place = change.int().argmax(dim=1, keepdim=True)
        moved = change.any(dim=1)
        # A row grew by one token if one place differs, was empty, follows a token and is now the last.
        last = obs.gather(1, place)
        end = ((obs >= 0) * torch.arange(obs.shape[1], device=obs.device)).amax(dim=1, keepdim=True)
        grown = (known.gather(1, place) < 0) & (place == end) & (obs.gather(1, (place - 1).clamp(min=0)) >= 0)
        grew = moved & (change.sum(dim=1) == 1) & (grown & (place > 0)).squeeze(1)
        self._ends = None
        if bool(grew.all()):
            found = self._forward(rows.advance, last.squeeze(1))
            self._ends, self._furthest = end, int(end.max())
        else:
            other = moved & ~grew
            if bool(other.all()):
                return self._restart(obs)
            found = last_seen
            if bool(grew.any()):
                stepped = self._forward(rows.advance, last.squeeze(1).clamp(min=0), (~grew).nonzero().squeeze(1))
                found = tuple(torch.where(grew.unsqueeze(1), s, x) for s, x in zip(stepped, found, strict=True))
            if bool(other.any()):
                index = other.nonzero().squeeze(1)
                fresh = self._forward(rows.refill, index, obs[index])
                found = tuple(x.index_copy(0, index, f) for f, x in zip(fresh, found, strict=True))
        self._obs = obs.clone()
        return found

    def _restart(self, obs: Tensor) -> tuple[Tensor, ...]:
        self._ends = None
        held = int((obs >= 0).sum(dim=1).max())
        self._rows = rows_of(self.model, obs.shape[1] - held, self._places)
        if self._rows is None:
            return self._forward(_next_logits, self.model, obs, self._places)
        self._obs = obs.clone()
        return self._forward(self._rows.prefill, obs)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Tensor,
    uniforms: Tensor,
    eos_token_id: EosIds,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    min_new_tokens: int = 0,
    observe: Callable[[int, Tensor, Tensor], object] | None = None,
    fixed: FixedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a response per row until EOS or the length limit; finished rows leave the batch.

    Args:
        prompts: ``(N, P)`` int64, left-padded with -1.
        uniforms: ``(N, max_new_tokens)`` float64 in [0, 1), one per token.
        eos_token_id: one or several, any of which ends a response.
        observe: called before token t is sampled with t, the rows ``(n,)`` that still run, and the hidden states
            ``(n, d)`` behind their logits.
        fixed: rows to decode in fixed shapes; None decodes in growing ones.

    Returns:
        response ``(N, max_new_tokens)`` int64, right-padded with -1, EOS included; logprob of the same shape, 0 beyond
        the end.
    """
    count = prompts.shape[0]
    response = prompts.new_full((count, max_new_tokens), -1)
    logprob = torch.zeros_like(response, dtype=torch.promote_types(model.dtype, torch.float32))
    rows = fixed if fixed is not None else rows_of(model, max_new_tokens)
    active = torch.arange(count, device=prompts.device)
    watched: AbstractContextManager[list[Tensor]] = nullcontext([]) if observe is None else head_inputs(model)
    with watched as hidden:
        logits = _next_logits(model, prompts) if rows is None else rows.prefill(prompts)
        for t in range(max_new_tokens):
            if observe is not None:
                observe(t, active, fixed.hidden if fixed is not None and t else hidden[-1][:, -1])
            hidden.clear()
            logits = forbid_early_eos(logits, t, eos_token_id, min_new_tokens, in_place=True)
            tokens, token_logprob = sample(logits, uniforms[active, t], temperature)
            response[active, t], logprob[active, t] = tokens, token_logprob.to(logprob.dtype)
            if t + 1 == max_new_tokens:
                break
            going = ~is_eos(tokens, eos_token_id)
            if not bool(going.all()):
                kept = going.nonzero().squeeze(1)
                if not len(kept):
                    break
                active, tokens = active[kept], tokens[kept]
                if rows is not None:
                    rows.keep(kept)
            if rows is not None:
                logits = rows.advance(tokens)
            else:
                logits = _next_logits(model, torch.cat([prompts[active], response[active, : t + 1]], dim=1), t + 1)
    return response, logprob


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    eos_token_id: EosIds,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    batch_size: int = 256,
) -> list[list[int]]:
    """Return the greedy response to each prompt (token ids without padding), EOS included; ``batch_size`` prompts of
    similar length at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = torch.from_numpy(left_pad([prompts[i] for i in chosen], len(prompts[chosen[-1]])))
        uniforms = torch.full((len(chosen), max_new_tokens), 0.5, dtype=torch.float64, device=model.device)
        lengths: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
        response, _ = generate(model, rows.to(model.device), uniforms, eos_token_id, temperature=GREEDY, **lengths)
        found.update((i, row[row >= 0].tolist()) for i, row in zip(chosen, response, strict=True))
    return [found[i] for i in range(len(prompts))]


def _next_logits(model: PreTrainedModel, obs: Tensor, response_places: int = 0) -> Tensor:
    """Return ``(B, V)`` without a cache."""
    if is_encoder_decoder(model):
        prompt, response = obs.split([obs.shape[1] - response_places, response_places], dim=1)
        inputs = teacher_forced(model, prompt, F.pad(response, (0, 1)))
        last = (response >= 0).sum(dim=1) + inputs["decoder_input_ids"].shape[1] - response_places - 1
        logits = model(**inputs, use_cache=False).logits
        return logits[torch.arange(len(obs), device=obs.device), last]
    inputs = model_inputs(right_align(obs))
    return model(**accepted(model, **inputs, logits_to_keep=1, use_cache=False)).logits[:, -1]
