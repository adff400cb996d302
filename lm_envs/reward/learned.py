"""Reward models: sequence classifiers of any family in transformers with their tokenizers, as rewards or to train."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lm_envs.model.adapters import base_of, is_adapter, merged
from lm_envs.model.forwards import rows_at_once
from lm_envs.model.layers import fuse
from lm_envs.model.loading import (
    HOST,
    Placement,
    _load,
    _place,
    _read_tokenizer,
    check_fits,
    load_policy,
    load_tokenizer,
    read_config,
    read_weights,
)
from lm_envs.model.tokens import accepted, context_of, encode_text, right_pad
from lm_envs.settings import one_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LearnedReward", "Output", "pools_last_token", "raw_scores", "score_of"]

Output = Literal["log_odds", "logit", "probability"]
Template = Literal["text", "chat"]
# How the weights of new heads are called.
_HEADS = ("score.", "classifier.", "classification_head.", "pooler.", "pre_classifier.")


def pools_last_token(model: nn.Module) -> bool:
    """Whether a classifier is decoder-style: a linear ``score`` of the last token's hidden state."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def raw_scores(
    model: PreTrainedModel, ids: Tensor, pad_token_id: int = 0, label: int | None = None, output: Output = "log_odds"
) -> Tensor:
    """Score token ids with a sequence classifier, differentiably.

    A decoder-style head reads the last token **by position**; stock heads look for the last id that differs from the
    pad id, and so skip a real EOS if pad and EOS share an id.

    Args:
        ids: ``(N, L)`` int64, right-padded with -1; at least one token per row.
        pad_token_id: the id of padding, for encoders that derive positions from it.
        label, output: as for :func:`score_of`.

    Returns:
        ``(N,)``: by default the logit of a one-label model, the log-odds ``logit 1 - logit 0`` of a two-label one.
    """
    present = ids >= 0
    inputs = {"input_ids": ids.masked_fill(~present, pad_token_id), "attention_mask": present.long()}
    if pools_last_token(model):
        last = present.sum(dim=1) - 1
        trunk = model.base_model
        # Causal attention never sees padding on the right, and is faster without a mask.
        inputs["attention_mask"] = torch.ones_like(ids)
        hidden = trunk(**accepted(trunk, **inputs, use_cache=False)).last_hidden_state
        logits = model.score(hidden[torch.arange(len(ids), device=ids.device), last])
    else:
        logits = model(**inputs).logits
    return score_of(logits, label, output, independent=has_independent_labels(model))


def has_independent_labels(model: nn.Module) -> bool:
    """Whether each label has its own probability, instead of all sharing one."""
    return getattr(model.config, "problem_type", None) == "multi_label_classification"


def score_of(
    logits: Tensor, label: int | None = None, output: Output = "log_odds", *, independent: bool = False
) -> Tensor:
    """Reduce a classifier's logits ``(..., K)`` to one number, ``(...)``.

    Args:
        label: the label to score; None is the only one of K = 1 and the second of K = 2.
        output: ``"log_odds"``, ``log p - log(1 - p)`` of the label's probability (for one label, its logit);
            ``"logit"``; or ``"probability"``.
        independent: each label has its own probability.
    """
    if label is None:
        label = min(logits.shape[-1] - 1, 1)
    score = logits[..., label]
    if output == "logit":
        return score
    if logits.shape[-1] > 1 and not independent:
        others = [k for k in range(logits.shape[-1]) if k != label]
        score = score - logits[..., others].logsumexp(dim=-1)
    return score.sigmoid() if output == "probability" else score


class LearnedReward:
    """A transformers sequence classifier with its own tokenizer, as a reward.

    It reads prompt and completion as one text. For decoder-style models, the tokenizer's EOS follows if and only if the
    response stopped; for encoders, the tokenizer adds its usual special tokens. With ``template="chat"`` it reads a
    conversation in the tokenizer's chat template, without the end of turn if the response did not stop. In a text
    longer than the model's context, the start of the prompt is cut after leading special tokens, with one warning.

    Args:
        model: any ``AutoModelForSequenceClassification``.
        tokenizer: the model's own.
        normalise: ``(mean, std)``: the reward is ``(score - mean) / std``.
        batch_size: the most texts per forward; texts of similar length go together.
        name: the name in messages and results.
        label: the label to score, a number from 0 or a name in the config's ``id2label``, such as ``"POSITIVE"``. None
            is the only one, or the second of two.
        output: ``"log_odds"``, ``"logit"`` or ``"probability"``, see :func:`score_of`.
        template: ``"text"`` or ``"chat"``.

    Raises:
        ValueError: the model has more than two labels and none is named, it has no such label, std is not positive, or
            the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        normalise: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 64,
        name: str = "reward_model",
        *,
        label: int | str | None = None,
        output: Output = "log_odds",
        template: Template = "text",
    ) -> None:
        mean, std = map(float, normalise)
        if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
            raise ValueError(f"normalise must be a finite mean and a positive std, got {normalise}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        one_of(output, get_args(Output), "output")
        one_of(template, get_args(Template), "template")
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"reward model {name!r}: its tokenizer has no chat template; use template='text'")
        self.label, self.output, self.template = _label(model.config, label, name), output, template
        self.model, self.tokenizer = fuse(model), tokenizer
        self.normalise, self.batch_size = (mean, std), batch_size
        self.__name__ = name
        self._warned = False

    @property
    def is_plain(self) -> bool:
        """Whether it reads plain text and scores the default label's log-odds, as models trained from it do."""
        default = self.model.config.num_labels <= 2 and self.label in (None, self.model.config.num_labels - 1)
        return default and self.output == "log_odds" and self.template == "text"

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads, None if unknown."""
        return context_of(self.model)

    def encode(self, text: str, stopped: bool) -> list[int]:
        """Return the token ids of a text."""
        ids = encode_text(self.tokenizer, text, stopped, append_eos=pools_last_token(self.model))
        if not ids:
            raise ValueError(f"reward model {self.__name__!r}: text {text!r} has no tokens")
        return self._fitted(ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], completion: str, stopped: bool) -> list[int]:
        """Return the token ids of a conversation and the assistant's reply."""
        found = self.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": completion}],
            tokenize=True,
            return_dict=True,
            continue_final_message=not stopped,
        )
        return self._fitted(list(found["input_ids"]))

    def _fitted(self, ids: list[int]) -> list[int]:
        limit = self.context
        if limit is not None and len(ids) > limit:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"reward model {self.__name__!r} reads {limit} tokens: it does not see the start of longer texts",
                    stacklevel=3,
                )
            special = set(self.tokenizer.all_special_ids)
            lead = next((i for i, token in enumerate(ids) if token not in special), 0)
            ids = ids[:lead] + ids[len(ids) - (limit - lead) :]
        return ids

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        finish_reasons: Sequence[str] | None = None,
        messages: Sequence[Sequence[Mapping[str, str]]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Score each sample; without ``finish_reasons`` every response counts as stopped, and without ``messages`` a
        chat template reads each prompt as one message of the user."""
        reasons = ["stop"] * len(completions) if finish_reasons is None else finish_reasons
        rows = []
        for i, (prompt, completion, reason) in enumerate(zip(prompts, completions, reasons, strict=True)):
            if self.template == "chat":
                before = [{"role": "user", "content": prompt}] if messages is None else messages[i]
                rows.append(self.encode_chat(before, completion, reason == "stop"))
            else:
                rows.append(self.encode(prompt + completion, reason == "stop"))
        mean, std = self.normalise
        return ((self.raw(rows) - mean) / std).tolist()

    @torch.no_grad()
    def raw(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Score N texts given as token ids, ``(N,)`` float64, not normalized."""
        self.model.eval()
        pad = self.tokenizer.pad_token_id
        scores = np.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        start = 0
        while start < len(order):
            chosen = order[start : start + self.batch_size]
            chosen = chosen[: rows_at_once(len(rows[chosen[-1]]), self.model.device)]
            start += len(chosen)
            ids = right_pad([rows[i] for i in chosen]).to(self.model.device)
            found = raw_scores(self.model, ids, pad if pad is not None else 0, self.label, self.output)
            scores[chosen] = found.double().cpu().numpy()
        return scores


def _label(config: Any, label: int | str | None, name: str) -> int | None:
    """Return the number of a label, None for the default."""
    count = config.num_labels
    names = {int(number): text for number, text in (config.id2label or {}).items()}
    listed = ", ".join(f"{k} ({names[k]})" if k in names else str(k) for k in range(count))
    if label is None:
        if count > 2:
            raise ValueError(
                f"reward model {name!r} has {count} labels: a reward needs one (a score) or two (the log-odds of the "
                f"second), or the label to score by: {listed}"
            )
        return None
    found = label
    if isinstance(label, str):
        named = [k for k, text in names.items() if text.casefold() == label.casefold()]
        found = named[0] if named else int(label) if label.isdigit() else -1
    if found not in range(count):
        raise ValueError(f"reward model {name!r} has no label {label!r}: it has {listed}")
    return int(found)


def load_reward_model(
    name: str | Path, what: str = "reward model", placement: Placement = HOST, **options: Any
) -> LearnedReward:
    """Load a sequence classifier and its tokenizer as a reward.

    Args:
        name: a folder saved by ``save_pretrained`` (model and tokenizer), or a hub name.
        what: the model's name in messages.
        placement: its precision and device.
        options: other arguments of :class:`LearnedReward`.

    Raises:
        ValueError: there is no such model, it holds no safetensors, it is not a sequence classifier (a language model
            has no reward head), or its tokenizer is missing or larger than its vocabulary.
    """
    model = _load(name, what, placement, AutoModelForSequenceClassification)
    tokenizer = _read_tokenizer(name, what)
    check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], f"{what} {str(name)!r}")
    return LearnedReward(model, tokenizer, name=str(name), **options)


def initialise_reward_head(head: nn.Linear, generator: torch.Generator) -> None:
    """Draw normal weights of std ``1 / sqrt(d + 1)``, d the number of inputs, with zero bias (Stiennon et al. 2020)."""
    with torch.no_grad():
        head.weight.normal_(std=(head.in_features + 1) ** -0.5, generator=generator)
        if head.bias is not None:
            head.bias.zero_()


def reward_start(
    name: str | Path, seed: int = 0, placement: Placement = HOST
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier with one label to train, in ``eval`` mode, and its tokenizer.

    Args:
        name: a folder saved by ``save_pretrained``, or a hub name, of a classifier with one label, or of a language
            model (its adapters are added to its weights) or bare trunk, which gets a new head
            (:func:`initialise_reward_head`).
        seed: of the head.
        placement: its precision and device.

    Returns:
        the model and the tokenizer. Their pad id differs from the EOS if the vocabulary has another special token,
        because transformers' own heads look for the last token that is not the pad.

    Raises:
        ValueError: there is no such model, it cannot score texts, has several labels, or no fitting tokenizer.
    """
    what = "reward model"
    place, trunk = os.path.expanduser(str(name)), None
    if is_adapter(place):
        trunk = merged(load_policy(place, what, placement)).base_model
        tokenizer, name = load_tokenizer(place, what), base_of(place, what)
    else:
        tokenizer = _read_tokenizer(name, what)
    place = _place(name, what)
    config = read_config(place, what)
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if config.model_type not in known:
        raise ValueError(f"{what} {place!r}: transformers has no {config.model_type!r} that scores texts")
    scores = any(name in known.values() for name in getattr(config, "architectures", None) or [])
    if scores and config.num_labels != 1:
        raise ValueError(f"{what} {place!r} has {config.num_labels} labels; training takes one, a score")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = read_weights(AutoModelForSequenceClassification, name, what, placement, num_labels=1)
    lacking = sorted(info["missing_keys"])
    if any(not (key.startswith(_HEADS) or ".pooler." in key) or scores for key in lacking):
        raise ValueError(f"{what} {place!r} cannot be trained on: its weights lack {', '.join(lacking[:3])}")
    if lacking and isinstance(getattr(model, "score", None), nn.Linear):
        initialise_reward_head(model.score, torch.Generator().manual_seed(seed))
    if trunk is not None:
        if trunk.state_dict().keys() != model.base_model.state_dict().keys():
            raise ValueError(
                f"{what} {place!r} has another trunk without its head: train its adapters with --lora-merge"
            )
        model.base_model.load_state_dict(trunk.state_dict())
    if broken := next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None):
        raise ValueError(f"{what} {place!r} cannot be trained on: {broken} holds NaN or infinity")
    check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], f"{what} {place!r}")
    others = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token)
    if found := [token for token in others if token not in (None, tokenizer.eos_token)]:
        tokenizer.pad_token = found[0]
    # Without a pad id transformers refuses to pad, instead of skipping a real EOS.
    model.config.pad_token_id = tokenizer.pad_token_id if found else None
    return model, tokenizer
