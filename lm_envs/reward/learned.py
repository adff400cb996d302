"""Learned reward models: transformers' sequence classifiers of any family, each with its own tokenizer."""

from __future__ import annotations

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

from lm_envs.model.fast_layers import fuse
from lm_envs.model.forwards import rows_at_once
from lm_envs.model.loading import HOST, Placement, _load, _read_tokenizer, check_fits
from lm_envs.model.tokens import accepted, context_of, encode_text, right_pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LearnedReward", "Output", "pools_last_token", "raw_scores", "score_of"]

Output = Literal["log_odds", "logit", "probability"]


def pools_last_token(model: nn.Module) -> bool:
    """Whether a classification model is of the decoder kind: a linear ``score`` on the last token's hidden state."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def raw_scores(
    model: PreTrainedModel, ids: Tensor, pad_token_id: int = 0, label: int | None = None, output: Output = "log_odds"
) -> Tensor:
    """A sequence-classification model's scores, differentiable.

    The last token of a decoder-style head is found **by place**. The stock heads look for the last id that
    differs from the pad id, and so skip a real EOS where pad and EOS share an id.

    Args:
        ids: ``(N, L)`` int64, right-padded with -1; at least one token a row.
        pad_token_id: put where there is no token; masked, so its value only matters to encoders that derive
            positions from it.
        label, output: as :func:`score_of` takes them.

    Returns:
        ``(N,)``: by default the logit of a one-label model, the log-odds ``logit 1 - logit 0`` of a two-label one.
    """
    present = ids >= 0
    inputs = {"input_ids": ids.masked_fill(~present, pad_token_id), "attention_mask": present.long()}
    if pools_last_token(model):
        last = present.sum(dim=1) - 1
        trunk = model.base_model
        # What stands to the right of the last token is never looked at: plain causal attention is faster.
        inputs["attention_mask"] = torch.ones_like(ids)
        hidden = trunk(**accepted(trunk, **inputs, use_cache=False)).last_hidden_state
        logits = model.score(hidden[torch.arange(len(ids), device=ids.device), last])
    else:
        logits = model(**inputs).logits
    return score_of(logits, label, output, independent=has_independent_labels(model))


def has_independent_labels(model: nn.Module) -> bool:
    """Whether each label of a classifier has a probability of its own, instead of all sharing one."""
    return getattr(model.config, "problem_type", None) == "multi_label_classification"


def score_of(
    logits: Tensor, label: int | None = None, output: Output = "log_odds", *, independent: bool = False
) -> Tensor:
    """One number from a classifier's logits ``(..., K)``, shape ``(...)``.

    Args:
        label: whose score; None is the only one of K = 1 and the second of K = 2.
        output: ``"log_odds"``, ``log p - log(1 - p)`` of the label's probability (for one label that is its logit);
            ``"logit"``, the label's as it is; or ``"probability"``.
        independent: the labels do not exclude each other, so each has a probability of its own.
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
    """A transformers sequence-classification model as a reward, over a text bridge: it has its own tokenizer.

    A text is prompt and completion, joined as they are. For decoder-style models the tokenizer's EOS follows
    if and only if the response stopped; for encoders the tokenizer wraps the text its usual way. With
    ``template="chat"`` it is the conversation as the tokenizer's chat template writes it, left open at its end where
    the response did not stop. A text longer than the model's context loses the start of its prompt (leading special
    tokens stay), with one warning.

    Args:
        model: any ``AutoModelForSequenceClassification`` with one label (its logit is the score) or two (the
            log-odds of the second are); of one with more, ``label`` says which.
        tokenizer: the model's own.
        normalise: ``(mean, std)``: the reward is ``(score - mean) / std``.
        batch_size: texts per forward, at the most; texts of similar length go together.
        name: what messages and results call it.
        label: whose score it is, a number from 0 or a name of the config's ``id2label``, such as ``"POSITIVE"``.
        output: ``"log_odds"``, ``"logit"`` or ``"probability"``, see :func:`score_of`.
        template: ``"text"`` or ``"chat"``.

    Raises:
        ValueError: the model has more than two labels and none is named, it has no such label, std is not positive, or
            the tokenizer has no chat template to follow.
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
        template: Literal["text", "chat"] = "text",
    ) -> None:
        mean, std = map(float, normalise)
        if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
            raise ValueError(f"normalise must be a finite mean and a positive std, got {normalise}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if output not in get_args(Output):
            raise ValueError(f"output must be one of {', '.join(get_args(Output))}, not {output!r}")
        if template not in ("text", "chat"):
            raise ValueError(f"template must be 'text' or 'chat', not {template!r}")
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"reward model {name!r}: its tokenizer has no chat template; use template='text'")
        self.label, self.output, self.template = _label(model.config, label, name), output, template
        self.model, self.tokenizer = fuse(model), tokenizer
        self.normalise, self.batch_size = (mean, std), batch_size
        self.__name__ = name
        self._warned = False

    @property
    def is_plain(self) -> bool:
        """Whether it reads plain text and its score is the default one of its model: what trains like it may assume."""
        default = self.model.config.num_labels <= 2 and self.label in (None, self.model.config.num_labels - 1)
        return default and self.output == "log_odds" and self.template == "text"

    @property
    def context(self) -> int | None:
        """The most tokens the model reads, None if its config does not say."""
        return context_of(self.model)

    def encode(self, text: str, stopped: bool) -> list[int]:
        """The ids the model reads for a text."""
        ids = encode_text(self.tokenizer, text, stopped, append_eos=pools_last_token(self.model))
        if not ids:
            raise ValueError(f"reward model {self.__name__!r}: text {text!r} has no tokens")
        return self._fitted(ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], completion: str, stopped: bool) -> list[int]:
        """The ids the model reads for a conversation's messages and the assistant's reply to them."""
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
                    f"reward model {self.__name__!r} reads {limit} tokens: of longer texts it does not see the start",
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
        """One reward per sample; without ``finish_reasons`` every response counts as stopped.

        ``messages`` are the prompts' for a chat template; without them each prompt is one message of a user.
        """
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
        """``(N,)``: the model's own scores of N texts given as token ids, before they are put in units."""
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
    """The number of a label, None where there is nothing to choose."""
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
    if isinstance(label, str):
        found = [k for k, text in names.items() if text.casefold() == label.casefold()]
        if not found and label.isdigit():
            found = [int(label)]
    else:
        found = [label]
    if not found or not 0 <= found[0] < count:
        raise ValueError(f"reward model {name!r} has no label {label!r}: it has {listed}")
    return found[0]


def load_reward_model(
    name: str | Path,
    what: str = "reward model",
    placement: Placement = HOST,
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
        placement: its precision and device.
        normalise, batch_size, label, output, template: as for :class:`~lm_envs.reward.learned.LearnedReward`.

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
        placement,
    )
    tokenizer = _read_tokenizer(name, what)
    check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], f"{what} {str(name)!r}")
    return LearnedReward(
        model, tokenizer, normalise, batch_size, name=str(name), label=label, output=output, template=template
    )


def initialise_reward_head(head: nn.Linear, generator: torch.Generator) -> None:
    """Normal weights of std ``1 / sqrt(d + 1)`` and zero bias (Stiennon et al. 2020), d the number of inputs."""
    with torch.no_grad():
        head.weight.normal_(std=(head.in_features + 1) ** -0.5, generator=generator)
        if head.bias is not None:
            head.bias.zero_()
