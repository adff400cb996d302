"""Start of a reward model's training: a language model's trunk with a new head, or a trained reward model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lm_envs.model import loading
from lm_envs.printable import first_line
from lm_envs.reward.learned import initialise_reward_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HEADS = ("score.", "classifier.", "classification_head.", "pooler.", "pre_classifier.")


def reward_start(
    name: str | Path, seed: int = 0, placement: loading.Placement = loading.HOST
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier with one label, in ``eval`` mode, and its tokenizer.

    Args:
        name: a folder saved by ``save_pretrained``, or a hub name: of a language model or a bare trunk, which gets a
            new head (:func:`~lm_envs.reward.learned.initialise_reward_head`), or of a classifier with one label.
        seed: of the head.
        placement: its precision and device.

    Returns:
        the model and the tokenizer. Their pad id differs from the EOS if the vocabulary has another special token for
        it, because transformers' own heads look for the last token that is not the pad.

    Raises:
        ValueError: there is no such folder or model, it cannot score texts, has several labels, or no fitting
            tokenizer.
    """
    what = "reward model"
    place = loading._place(name, what)
    tokenizer = loading._read_tokenizer(name, what)
    config = loading.read_config(place, what)
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if config.model_type not in known:
        raise ValueError(f"{what} {place!r}: transformers has no {config.model_type!r} that scores texts")
    scores = any(name in known.values() for name in getattr(config, "architectures", None) or [])
    if scores and config.num_labels != 1:
        raise ValueError(f"{what} {place!r} has {config.num_labels} labels; training takes one, a score")
    try:
        with torch.random.fork_rng(devices=[]), loading.quiet():
            torch.manual_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                place,
                num_labels=1,
                dtype=placement.torch_dtype,
                device_map=placement.device_map,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        raise ValueError(f"{what} {place!r} cannot be read: {first_line(error)}") from error
    loading.refuse_more_layers(info["unexpected_keys"], model, f"{what} {place!r}")
    lacking = sorted(info["missing_keys"])
    if any(not (key.startswith(_HEADS) or ".pooler." in key) or scores for key in lacking):
        raise ValueError(f"{what} {place!r} cannot be trained on: its weights lack {', '.join(lacking[:3])}")
    if lacking and isinstance(getattr(model, "score", None), nn.Linear):
        initialise_reward_head(model.score, torch.Generator().manual_seed(seed))
    loading.check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], f"{what} {place!r}")
    _tell_pad_from_eos(model, tokenizer)
    return (model if placement.device is None else model.to(placement.device)).eval(), tokenizer


def _tell_pad_from_eos(model: Any, tokenizer: Any) -> None:
    others = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token)
    if found := [token for token in others if token not in (None, tokenizer.eos_token)]:
        tokenizer.pad_token = found[0]
    # Without a pad id transformers refuses to pad, instead of skipping a real EOS.
    model.config.pad_token_id = tokenizer.pad_token_id if found else None
