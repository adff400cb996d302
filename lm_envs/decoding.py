"""Incremental decoding: next-token logits of many rows with one forward a step, and sampling by inverse CDF."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lm_envs.kernels.logprob_kl import scaled
from lm_envs.kernels.threads import WORTH, at_most
from lm_envs.observations import accepted, head_inputs, model_inputs
from lm_envs.row_cache import RowCache, can_cache

BLOCK = 64  # tokens whose probabilities are summed before the search: a cumulative sum of all is slower than the rest


def sample(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sample by inverse CDF: the token whose interval of the cumulative distribution holds the uniform.

    Args:
        logits: ``(N, V)``; -inf excludes a token.
        uniforms: ``(N,)`` float64 in [0, 1).
        temperature: divides the logits.

    Returns:
        tokens ``(N,)`` int64 and their log-probabilities ``(N,)``.
    """
    x = scaled(logits, temperature)
    count, vocabulary = x.shape
    highest = x.amax(dim=-1, keepdim=True)
    weight = x.new_empty(count, -(-vocabulary // BLOCK), BLOCK)
    flat = weight.view(count, -1)
    torch.sub(x, highest, out=flat[:, :vocabulary]).exp_()
    flat[:, vocabulary:] = 0
    # float64: the rounding of a float32 sum would starve late tokens.
    blocks = weight.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = blocks[:, -1:]
    block, rest = _search(blocks, uniforms.unsqueeze(-1) * total)
    inner = weight.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=-1)
    place, _ = _search(inner, rest)
    tokens = block * BLOCK + place
    logprob = (x.gather(-1, tokens) - highest).squeeze(-1) - total.log().squeeze(-1).to(x.dtype)
    return tokens.squeeze(-1), logprob


def _search(cdf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``(N, 1)`` index of the interval of ``cdf (N, K)`` that holds the target, and how far into it that lies."""
    total = cdf[:, -1:]
    # Strictly below the total, so that an interval of no length cannot be hit.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cdf, target, right=True)
    return found, target - cdf.gather(-1, (found - 1).clamp(min=0)).masked_fill(found == 0, 0.0)


def forbid_early_eos(
    logits: Tensor, position: Tensor | int, eos_token_id: int, min_new_tokens: int, *, in_place: bool = False
) -> Tensor:
    """Logits with EOS at -inf where fewer than ``min_new_tokens`` tokens stand before it.

    Args:
        logits: ``(..., V)``.
        position: how many response tokens precede, an int or a tensor that broadcasts to ``logits.shape[:-1]``.
        in_place: change ``logits`` itself, which saves a copy. Gradients may flow through them all the same: a token
            of probability 0 has gradient 0.
    """
    if min_new_tokens <= 0 or (isinstance(position, int) and position >= min_new_tokens):
        return logits
    if not in_place:
        logits = logits.clone()
    column = logits.detach()[..., eos_token_id]
    if isinstance(position, int):
        column.fill_(float("-inf"))
    else:
        column.masked_fill_(position < min_new_tokens, float("-inf"))
    return logits


def _right_align(obs: Tensor) -> Tensor:
    """Shift every row so that its last token stands in the last column, and cut what no row needs. ``(B, L)``."""
    present = obs >= 0
    columns = torch.arange(obs.shape[1], device=obs.device)
    last = (present * (columns + 1)).amax(dim=1)  # (B,) one past the last token
    width = int(present.sum(dim=1).max())
    source = last.unsqueeze(1) - width + torch.arange(width, device=obs.device)
    aligned = obs.gather(1, source.clamp(min=0))
    return aligned.masked_fill(source < 0, -1)


def step_threads(model: PreTrainedModel, rows: int) -> int:
    """How many threads pay off when a model reads one token a row: by its size alone, so that the same run is computed
    the same way each time. On other devices than a CPU it does not matter."""
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1) - model.get_input_embeddings().weight.numel()
    if model.config.get_text_config().tie_word_embeddings:
        body += model.get_output_embeddings().weight.numel()
    return max(1, body * rows // WORTH)


class Decoder:
    """Next-token logits for rows that the caller may extend, swap or restart at any time.

    It compares each observation with the last one it saw: rows that grew by one token take one cached step together,
    all others are computed anew. Callers never manage a cache and cannot get a stale answer. A model whose cache has no
    rows that can be exchanged (:func:`~lm_envs.row_cache.can_cache`) is computed in full each time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cached = can_cache(model)
        self.reset()

    def reset(self) -> None:
        """Forget everything: needed after the model's weights change."""
        self._rows: RowCache | None = None
        self._obs: Tensor | None = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """Logits ``(B, V)`` after the last token of every row of ``obs`` ``(B, P + T)``, -1 where there is no token."""
        known = self._obs
        if known is None or self._logits is None or self._rows is None or known.shape != obs.shape:
            self._threads = step_threads(self.model, len(obs))
            return self._restart(obs)
        with at_most(self._threads):
            return self._step(obs, known, self._logits, self._rows)

    def _step(self, obs: Tensor, known: Tensor, logits: Tensor, rows: RowCache) -> Tensor:
        change = known != obs
        place = change.int().argmax(dim=1, keepdim=True)
        moved = change.any(dim=1)
        # Grown by one token: one place differs, it was empty, and it is next to the last token and the last now.
        last = obs.gather(1, place)
        end = ((obs >= 0) * torch.arange(obs.shape[1], device=obs.device)).amax(dim=1, keepdim=True)
        grown = (known.gather(1, place) < 0) & (place == end) & (obs.gather(1, (place - 1).clamp(min=0)) >= 0)
        grew = moved & (change.sum(dim=1) == 1) & (grown & (place > 0)).squeeze(1)
        if bool(grew.all()):
            logits = rows.advance(last.squeeze(1))
        else:
            other = moved & ~grew
            if bool(other.all()):
                return self._restart(obs)
            if bool(grew.any()):
                stepped = rows.advance(last.squeeze(1).clamp(min=0), (~grew).nonzero().squeeze(1))
                logits = torch.where(grew.unsqueeze(1), stepped, logits)
            if bool(other.any()):
                index = other.nonzero().squeeze(1)
                logits = logits.index_copy(0, index, rows.refill(index, _right_align(obs[index])))
        self._obs, self._logits = obs.clone(), logits
        return logits

    def _restart(self, obs: Tensor) -> Tensor:
        if not self.cached:
            return _next_logits(self.model, obs)
        aligned = _right_align(obs)
        self._rows = RowCache(self.model, room=obs.shape[1] - aligned.shape[1])
        self._logits = self._rows.prefill(aligned)
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
    observe: Callable[[int, Tensor, Tensor], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a response per row until EOS or the length limit; finished rows leave the batch.

    Args:
        prompts: ``(N, P)`` int64, left-padded with -1.
        uniforms: ``(N, max_new_tokens)`` float64 in [0, 1), the number each token is sampled with.
        observe: called before token t is sampled with t, the rows ``(n,)`` that still run, and the hidden states ``(n,
            d)`` that their logits are made from.

    Returns:
        response ``(N, max_new_tokens)`` int64, right-padded with -1, EOS included; logprob of the same shape, 0
        beyond the end.
    """
    count = prompts.shape[0]
    response = prompts.new_full((count, max_new_tokens), -1)
    logprob = torch.zeros(count, max_new_tokens, dtype=torch.float64 if model.dtype == torch.float64 else torch.float32)
    logprob = logprob.to(prompts.device)
    rows = RowCache(model, room=max_new_tokens) if can_cache(model) else None
    active = torch.arange(count, device=prompts.device)
    with head_inputs(model) as hidden, at_most(step_threads(model, count)):
        logits = _next_logits(model, prompts) if rows is None else rows.prefill(_right_align(prompts))
        for t in range(max_new_tokens):
            if observe is not None:
                observe(t, active, hidden[-1][:, -1])
            hidden.clear()
            logits = forbid_early_eos(logits, t, eos_token_id, min_new_tokens, in_place=True)
            tokens, token_logprob = sample(logits, uniforms[active, t], temperature)
            response[active, t], logprob[active, t] = tokens, token_logprob.to(logprob.dtype)
            if t + 1 == max_new_tokens:
                break
            going = tokens != eos_token_id
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
                logits = _next_logits(model, torch.cat([prompts[active], response[active, : t + 1]], dim=1))
    return response, logprob


def _next_logits(model: PreTrainedModel, obs: Tensor) -> Tensor:
    """``(B, V)`` without a cache."""
    inputs = model_inputs(_right_align(obs))
    return model(**accepted(model, **inputs, logits_to_keep=1, use_cache=False)).logits[:, -1]
