"""Loading models and tokenizers of the user's own: folders of ``save_pretrained``, or hub names, by the same code.

Weights come from safetensors and code only from transformers itself: nothing in a folder is executed. What does not
    fit is refused
before anything runs, in one line.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from lm_envs.reward_models import LearnedReward, Output

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["context_of", "load_policy", "load_reward_model", "load_tokenizer", "same_vocabulary", "vocabulary_of"]

_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "*.model", "merges.txt")


def load_policy(name: str | Path, what: str = "policy") -> PreTrainedModel:
    """A causal language model in float32, in ``eval`` mode.

    Args:
        name: a folder saved by ``save_pretrained``, or a hub name.
        what: how messages call it.

    Raises:
        ValueError: there is no such folder or model, it holds no safetensors, or it is not a causal language model.
    """
    return _load(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, name, what, "a causal language model")


def load_tokenizer(name: str | Path, what: str = "policy") -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a hub name; it has an EOS.

    Raises:
        ValueError: there is none, or it has no EOS token.
    """
    tokenizer = _read_tokenizer(name, what)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{what} {str(name)!r}: the tokenizer has no EOS token, so no response could end; "
            "set tokenizer.eos_token to one of its tokens and save it again"
        )
    return tokenizer


def load_reward_model(
    name: str | Path,
    what: str = "reward model",
    *,
    normalise: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 64,
    label: int | str | None = None,
    output: Output = "log_odds",
    template: Literal["text", "chat"] = "text",
) -> LearnedReward:
    """A sequence-classification model with its own tokenizer, as a reward.

    Args:
        name: a folder saved by ``save_pretrained`` (model and tokenizer), or a hub name.
        what: how messages call it.
        normalise, batch_size, label, output, template: as for :class:`~lm_envs.reward_models.LearnedReward`.

    Raises:
        ValueError: there is no such folder or model, it holds no safetensors, it is no sequence classifier (a
            language model's folder has no reward head), it has more than two labels and none is named, or its
            tokenizer is missing or larger than its vocabulary.
    """
    model = _load(
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        name,
        what,
        "a sequence-classification model",
    )
    tokenizer = _read_tokenizer(name, what)
    check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], f"{what} {str(name)!r}")
    return LearnedReward(
        model, tokenizer, normalise, batch_size, name=str(name), label=label, output=output, template=template
    )


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many tokens a causal language model's output has."""
    return int(model.get_output_embeddings().weight.shape[0])


def context_of(model: PreTrainedModel) -> int | None:
    """The most tokens a model reads, None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_fits(tokenizer: PreTrainedTokenizerBase, vocabulary: int, what: str) -> None:
    """Raise ValueError if a tokenizer gives ids that a model of this many tokens does not have."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocabulary:
        raise ValueError(
            f"{what}: the tokenizer's ids go up to {highest} and the model has {vocabulary} tokens: "
            "this is another model's tokenizer, or the model wants resize_token_embeddings(len(tokenizer))"
        )


def same_vocabulary(policy: PreTrainedModel, reference: PreTrainedModel, names: tuple[str, str]) -> None:
    """Raise ValueError if a policy and its reference do not share one vocabulary; ``names`` are for the message."""
    widths = vocabulary_of(policy), vocabulary_of(reference)
    if widths[0] != widths[1]:
        raise ValueError(
            f"policy {names[0]!r} has {widths[0]} output tokens and reference {names[1]!r} {widths[1]}: "
            "the KL penalty compares them token by token, so they must share one vocabulary"
        )


def _read_tokenizer(name: str | Path, what: str) -> PreTrainedTokenizerBase:
    place = _place(name, what)
    advice = "save it beside the model with tokenizer.save_pretrained"
    # Without any of its files, some classes of tokenizers come up empty instead of failing.
    if Path(place).is_dir() and not any(file for pattern in _TOKENIZER_FILES for file in Path(place).glob(pattern)):
        raise ValueError(f"{what} {place!r} holds no tokenizer: {advice}")
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what} {place!r}: its tokenizer cannot be read ({_first_line(error)}); {advice}") from error


def _load(auto: Any, heads: Any, name: str | Path, what: str, expected: str) -> Any:
    place = _place(name, what)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} {place!r} cannot be read: {_first_line(error)}") from error
    _check_head(config, heads, place, what, expected)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about weights that are missing, which is an error here
            model, info = auto.from_pretrained(
                place,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{what} {place!r} cannot be read: {_first_line(error)}") from error
    lacking = sorted(info["missing_keys"]) + [key for key, *_ in info["mismatched_keys"]]
    if lacking:
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise ValueError(f"{what} {str(name)!r} is not {expected}: its weights lack {shown}")
    return model.eval()


def _check_head(config: Any, heads: Any, place: str, what: str, expected: str) -> None:
    known: Collection[str] = [n for names in heads.values() for n in ([names] if isinstance(names, str) else names)]
    saved = getattr(config, "architectures", None) or []
    if saved and not any(architecture in known for architecture in saved):
        raise ValueError(f"{what} {place!r} was saved from {', '.join(saved)}; expected {expected}")
    if config.model_type not in heads:
        raise ValueError(f"{what} {place!r}: transformers has no {config.model_type!r} as {expected}")


def _place(name: str | Path, what: str) -> str:
    """A folder's path, or a hub name as it is.

    Raises:
        ValueError: it looks like a folder and is none, or holds no model.
    """
    text = os.path.expanduser(str(name))
    if Path(text).is_dir():
        if not (Path(text) / "config.json").is_file():
            raise ValueError(f"{what} {text!r}: the folder holds no config.json; expected one saved by save_pretrained")
        return text
    if (
        isinstance(name, Path)
        or Path(text).exists()
        or text.startswith((".", os.sep))
        or text.count("/") > 1
        or not text
    ):
        raise ValueError(f"{what} {text!r}: there is no such folder")
    return text


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
