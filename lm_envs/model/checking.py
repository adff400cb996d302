"""Refusal of models that cannot be used: by their config before weights are read, and by a trial after.

The trial compares a model's predictions with its own for one text without padding or cache, so an untested family is
either correct or refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lm_envs.model.decoding import Decoder
from lm_envs.model.forwards import response_forward
from lm_envs.model.kv_cache import RECOMPUTE, no_rows
from lm_envs.model.kv_cache_cross import rows_of
from lm_envs.model.tokens import NO_TOKEN, left_pad, right_pad

Texts = list[tuple[Tensor, Tensor]]  # prompt and response
LENGTHS = ((3, 7), (1, 9), (5, 4))  # tokens of prompt and response of the trial's texts
PLACES = 5, 9  # the longest of each
TOLERANCE = {torch.bfloat16: 0.15, torch.float16: 0.03}  # of the log-probabilities' standard deviation, for rounding
EXACT = 3e-3  # the same in float32 and float64: parts of many models are float32 always
_OTHER_SENSES = ("vision", "audio", "vq", "image", "speech")


def refuse_config(config: Any, what: str) -> None:
    """Raise ValueError if a model cannot be a policy by its config; ``what`` begins the message."""
    settings = config.to_dict()
    quantised = settings.get("quantization_config")
    if quantised:
        method = (isinstance(quantised, dict) and quantised.get("quant_method")) or "some method"
        raise ValueError(
            f"{what}: its weights are quantized by {method}: they cannot be trained, nor copied as a reference; "
            "save it in full precision (model.dequantize(), then save_pretrained) and load it with dtype bfloat16"
        )
    if settings.get("is_decoder") is False and not settings.get("is_encoder_decoder"):
        raise ValueError(
            f"{what}: {config.model_type} was saved as an encoder (is_decoder is false): it reads a text from both "
            "ends and cannot write one token after the other; use a causal language model (one that was trained as a "
            "decoder is saved with is_decoder=True)"
        )
    senses = [name for name in getattr(config, "sub_configs", {}) if name.startswith(_OTHER_SENSES)]
    saved = getattr(config, "architectures", None) or []
    if senses and not any(name.endswith("ForCausalLM") for name in saved):
        raise ValueError(
            f"{what}: {config.model_type} has a {' and a '.join(senses)}: it reads more than text, and "
            "environments are of text alone; save its language model by itself and give that"
        )


@torch.no_grad()
def check_model(model: PreTrainedModel, what: str = "policy", *, recompute: bool = False) -> None:
    """Try a model on a few short random texts, in about 25 forwards of up to 11 tokens; ValueError if it fails.

    Its logits must be finite and independent of later tokens, of a batch's padding, and of a cache whose rows grow, are
    swapped and restart. Windows longer than the texts are not reached.

    Args:
        model: on the device and in the precision of its use.
        what: begins the messages.
        recompute: accept a model whose cache cannot be kept by rows, and compute each token from its whole text, in
            time quadratic in the length; the model and its copies remember that.
    """
    texts, limit = _texts(model), TOLERANCE.get(model.dtype, EXACT)
    expected = [_alone(model, prompt, response) for prompt, response in texts]
    kind = model.config.model_type
    if not all(bool(x.isfinite().all()) for x in expected):
        where = f"{what}: {kind} gives logits that are NaN or infinite in {str(model.dtype).removeprefix('torch.')}"
        raise ValueError(f"{where}; load it with dtype float32, or check its weights")
    gap = _worst(_causality(model, texts, expected), model)
    if gap > limit:
        raise ValueError(
            f"{what}: the predictions of {kind} change with later tokens (by {gap:.2g} standard deviations): "
            "it reads from both ends, as encoders do, and is not a causal language model"
        )
    gap = max(_padding(model, texts, expected))
    if gap > limit:
        raise ValueError(
            f"{what}: the log-probabilities of {kind} change with the padding of a batch (by {gap:.2g} standard "
            "deviations), so ratios and KL would be wrong: not all of its layers in transformers hide padding; "
            "use another family (docs/models.md lists those that are tested)"
        )
    if rows_of(model) is None:
        if not recompute:
            raise ValueError(f"{what}: {no_rows(model)}")
        setattr(model, RECOMPUTE, True)
    gap = _worst(_stepping(model, texts, expected), model)
    if gap > limit:
        if recompute and rows_of(model) is not None:
            setattr(model, RECOMPUTE, True)
            return
        raise ValueError(
            f"{what}: {kind} gives other log-probabilities with its cache than without (by {gap:.2g} standard "
            "deviations); recompute=True (--recompute on the command line) does without the cache and is slower"
        )


def _texts(model: PreTrainedModel) -> Texts:
    generator = torch.Generator().manual_seed(0)
    width = int(model.get_output_embeddings().weight.shape[0])

    def text(count: int) -> Tensor:
        return torch.randint(width, (count,), generator=generator).to(model.device)

    return [(text(prompt), text(response)) for prompt, response in LENGTHS]


def _alone(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> Tensor:
    """Return ``(T, V)`` logits of one text, without padding."""
    return response_forward(model, prompt[None], response[None]).logits()[0]


def _causality(model: PreTrainedModel, texts: Texts, expected: list[Tensor]) -> list[float]:
    (prompt, response), known = texts[0], expected[0]
    return [_gap(_alone(model, prompt, response[: t + 1])[t], known[t]) for t in range(len(response))]


def _padding(model: PreTrainedModel, texts: Texts, expected: list[Tensor]) -> list[float]:
    prompts = torch.as_tensor(left_pad([p.tolist() for p, _ in texts], 7), device=model.device)
    responses = F.pad(right_pad([r.tolist() for _, r in texts]), (0, 2), value=NO_TOKEN).to(model.device)
    found = response_forward(model, prompts, responses).logits()
    return [_gap(found[row, : len(known)], known) for row, known in enumerate(expected)]


def _stepping(model: PreTrainedModel, texts: Texts, expected: list[Tensor]) -> list[float]:
    """Decode in two rows that grow; each text begins in a row that another one has left."""
    decoder, gaps = Decoder(model, response_places=PLACES[1]), []
    prompt_places, _ = PLACES
    obs = torch.full((2, sum(PLACES)), NO_TOKEN, device=model.device)
    queue, running = list(range(len(texts))), [(-1, 0), (-1, 0)]  # which text, and how much of it
    for _ in range(2 * sum(len(response) for _, response in texts)):
        for row, (number, length) in enumerate(running):
            if number >= 0 and length + 1 < len(texts[number][1]):
                obs[row, prompt_places + length] = texts[number][1][length]
                running[row] = number, length + 1
            elif queue:
                number = queue.pop(0)
                prompt = texts[number][0]
                obs[row] = NO_TOKEN
                obs[row, prompt_places - len(prompt) : prompt_places] = prompt
                running[row] = number, 0
            elif number >= 0:
                running[row] = -1, 0  # no text is left: the row stands still
        if all(number < 0 for number, _ in running):
            break
        logits = decoder(obs)
        gaps += [_gap(logits[row], expected[n][t]) for row, (n, t) in enumerate(running) if n >= 0]
    return gaps


def _gap(found: Tensor, known: Tensor) -> float:
    """Mean difference of log-probabilities in units of their standard deviation, the median over positions: in
    mixtures of experts, rounding alone sometimes sends a token to another expert."""
    a, b = (x.float().log_softmax(dim=-1) for x in (found, known))
    return float(((a - b).abs().mean(dim=-1) / b.std(dim=-1).clamp(min=1e-3)).median())


def _worst(gaps: list[float], model: PreTrainedModel) -> float:
    """The largest; in half precision without the largest fifth, because of experts as in :func:`_gap`."""
    return sorted(gaps)[-1 if model.dtype not in TOLERANCE else int(0.8 * (len(gaps) - 1))]
