"""Teacher-forced scoring of responses: one forward for all positions, logits for response tokens only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lm_envs.kernels.linear_logprob_kl import Exclude
from lm_envs.kernels.logprob_kl import LogprobKL, logprob_kl
from lm_envs.model.decoding import forbid_early_eos, keep_top
from lm_envs.model.encoder_decoder import is_encoder_decoder, teacher_forced
from lm_envs.model.output_head import OutputHead, hidden_and_head
from lm_envs.model.tokens import EosIds, accepted, head_inputs, model_inputs

# Tokens per forward, by whether it is on CUDA. On a CPU more take memory and are no faster.
TOKENS = {False: 2**10, True: 2**17}
# Numbers beyond which the logits of responses are not held.
MOST_LOGITS = {"cpu": 2**23, "cuda": 2**27}


def rows_at_once(width: int, device: torch.device) -> int:
    """Return the number of texts of ``width`` tokens that one forward without gradients should read."""
    return max(1, TOKENS[device.type == "cuda"] // max(width, 1))


@dataclass
class ResponseForward:
    """A teacher-forced forward of responses ``(B, T)``: position t stands *before* token t.

    Attributes:
        hidden: ``(B, T, d)``, the last hidden states. Values beyond a row's end are meaningless, here and below.
        head: computes logits from them; None if logits are held.
    """

    hidden: Tensor
    head: OutputHead | None
    _held: Tensor | None = None
    _exclude: Exclude | None = None

    def logits(self) -> Tensor:
        """Return ``(B, T, V)`` with excluded tokens at -inf, computed unless they are held."""
        if self._held is not None:
            return self._held
        assert self.head is not None
        return _excluded(self.head.logits(self.hidden), self._exclude)

    def logprob(self, ids: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> LogprobKL:
        """Return the log-probability of ``ids`` and the entropy, ``(B, T)``."""
        if self.head is None:
            return logprob_kl(self.logits(), None, ids, temperature=temperature, mask=mask)
        return self.head.logprob(self.hidden, ids, temperature=temperature, mask=mask, exclude=self._exclude)


def many_logits(model: PreTrainedModel, response: Tensor) -> bool:
    """Whether responses have more logits than are held."""
    return response.numel() * model.get_output_embeddings().weight.shape[0] > MOST_LOGITS[response.device.type]


def response_forward(
    model: PreTrainedModel, prompt: Tensor, response: Tensor, exclude: Exclude | None = None
) -> ResponseForward:
    """Run one forward for all positions of a response ``(B, T)``, right-padded, to prompts ``(B, P)``, left-padded.

    Logits are held if they are few, since that is faster than computing them twice, or if the head is not understood.
    ``exclude`` is that of :func:`~lm_envs.kernels.linear_logprob_kl.linear_logprob_kl`.
    """
    steps, given = response.shape[1], _inputs(model, prompt, response)
    if many_logits(model, response):
        found = hidden_and_head(model, given)
        if found is not None:
            return ResponseForward(found[0][:, -steps:], found[1], None, exclude)
    with head_inputs(model) as seen:  # the response's positions alone, if the model takes logits_to_keep
        logits = model(**given).logits[:, -steps:]
    return ResponseForward(seen[0][:, -steps:], None, _excluded(logits, exclude), exclude)


def _excluded(logits: Tensor, exclude: Exclude | None) -> Tensor:
    if exclude is None:
        return logits
    logits = logits.contiguous()
    flat = logits.detach().view(-1, logits.shape[-1])  # gradients stay right: that of probability 0 is 0
    exclude(flat, torch.arange(len(flat), device=flat.device))
    return logits


def early_eos(steps: int, eos_token_id: EosIds, min_new_tokens: int) -> Exclude | None:
    """Return a function that excludes EOS at the first ``min_new_tokens`` of ``steps`` positions, None for 0."""
    if min_new_tokens <= 0:
        return None
    return lambda logits, rows: forbid_early_eos(logits, rows % steps, eos_token_id, min_new_tokens, in_place=True)


def _inputs(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> dict[str, object]:
    inputs = (teacher_forced if is_encoder_decoder(model) else _causal_inputs)(model, prompt, response)
    return accepted(model, **inputs, logits_to_keep=response.shape[1], use_cache=False)


def _causal_inputs(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> dict[str, Tensor]:
    obs = torch.cat([prompt, response[:, :-1]], dim=1)
    if bool((prompt >= 0).all()):
        # Without left padding, plain causal attention suffices and is faster.
        return {"input_ids": obs.clamp(min=0), "attention_mask": torch.ones_like(obs)}
    return model_inputs(obs)


def picked_logits(
    model: PreTrainedModel, prompt: Tensor, response: Tensor, row: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Return logits ``(N, V)`` and hidden states ``(N, d)`` before tokens ``position (N,)`` of texts ``row (N,)``.

    The head is computed for these tokens alone.
    """
    given, picked = _inputs(model, prompt, response), []

    def pick(_: object, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        picked.append(states[0][:, -response.shape[1] :][row, position])
        return (picked[0].unsqueeze(0), *states[1:])

    watch = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        return model(**given).logits[0], picked[0]
    finally:
        watch.remove()


@torch.no_grad()
def response_logprob(
    model: PreTrainedModel,
    prompt: Tensor,
    response: Tensor,
    eos_token_id: EosIds,
    *,
    temperature: float = 1.0,
    min_new_tokens: int = 0,
    top_k: int | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Return the log-probability of every response token under a frozen model, ``(B, T)``, 0 beyond the end.

    ``top_k`` restricts the model to its likeliest tokens; others have -inf. Rows of similar length are scored together,
    ``batch_size`` at a time; None chooses a size.
    """

    def exclude(logits: Tensor, rows: Tensor) -> None:
        forbid_early_eos(logits, rows % width, eos_token_id, min_new_tokens, in_place=True)
        if top_k is not None:
            keep_top(logits, top_k)

    lengths = (response >= 0).sum(dim=1)
    result = torch.zeros_like(response, dtype=torch.promote_types(model.dtype, torch.float32))
    batch_size = batch_size or rows_at_once(prompt.shape[1] + response.shape[1], response.device)
    for rows in lengths.argsort(stable=True).split(batch_size):
        width = max(int(lengths[rows].max()), 1)
        texts, given = prompt[rows], response[rows, :width]
        texts = texts[:, int(((texts >= 0).any(dim=0).cumsum(0) == 0).sum()) :]  # without empty columns
        mask = given >= 0
        now = response_forward(model, texts, given, exclude if top_k or min_new_tokens else None)
        found = now.logprob(given.clamp(min=0), temperature=temperature, mask=mask).logprob
        result[rows, :width] = found.to(result.dtype)
        del now  # or its logits stay while the next are made
    return result
