"""Rewards: the calling convention and its validation, learned reward models, and compositions.

A reward is any callable in the convention of TRL's reward functions::

    reward(prompts=[...], completions=[...], completion_ids=[[...]], finish_reasons=["stop", "length"],
    **columns)

with one entry per sample in each list, that returns one number per sample, or one per response token (a dense
reward). Texts come without special tokens; ``completion_ids`` hold the EOS of a response that stopped. It need
not name what it does not use.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_envs.fused import fuse
from lm_envs.observations import accepted
from lm_envs.scoring import rows_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Clip", "LearnedReward", "Reward", "Standardise", "WeightedSum", "call_reward", "encode_text", "raw_scores"]


class Reward(Protocol):
    """Anything that scores completions; see the module's text for the convention."""

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> Sequence[float] | Sequence[Sequence[float]] | NDArray[Any] | Tensor:
        """One number per sample, or one per response token."""
        ...


AnyReward = Reward | Callable[..., Any]


def reward_name(reward: AnyReward) -> str:
    """How messages and results call a reward: its ``__name__``, else its class's."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def call_reward(
    reward: AnyReward,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    finish_reasons: Sequence[str],
    **columns: Sequence[Any],
) -> NDArray[np.float64]:
    """Call a reward and check what it returns.

    Args:
        reward: the callable; it is passed those of the lists that its signature names, or all if it takes
            ``**kwargs``.
        prompts, completions: N texts each, without special tokens.
        completion_ids: N lists of token ids, EOS included where the response stopped.
        finish_reasons: N times ``"stop"`` or ``"length"``.
        columns: further columns of the data, N entries each.

    Returns:
        ``(N,)`` float64, or ``(N, T)`` for a dense reward: T is the longest response, 0 beyond a response's
        end.

    Raises:
        ValueError: the number of rewards is not N, a row of a dense reward is shorter than its response, or
            a reward is missing, NaN or infinite. The message names the reward and the sample.
    """
    name, count = reward_name(reward), len(completions)
    given: dict[str, Sequence[Any]] = {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        "finish_reasons": finish_reasons,
        **columns,
    }
    raw = reward(**_accepted(reward, given))
    if isinstance(raw, Tensor):
        raw = raw.detach().cpu().double().numpy()
    try:
        rows = list(raw)
    except TypeError:
        raise ValueError(f"reward {name!r} returned a {type(raw).__name__}, not a list of numbers") from None
    if len(rows) != count:
        raise ValueError(f"reward {name!r} returned {len(rows)} rewards for {count} samples")

    def sample(i: int) -> str:
        return f"sample {i} (prompt {_short(prompts[i])}, completion {_short(completions[i])})"

    lengths = [len(ids) for ids in completion_ids]
    dense = count > 0 and np.ndim(rows[0]) == 1
    result = np.zeros((count, max(lengths)) if dense else count)
    for i, row in enumerate(rows):
        if row is None:
            raise ValueError(f"reward {name!r} returned None for {sample(i)}")
        try:
            values = np.asarray(row, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"reward {name!r} returned {row!r} for {sample(i)}, which is not a number") from None
        if values.ndim != int(dense):
            raise ValueError(
                f"reward {name!r} returned an entry of shape {values.shape} for {sample(i)}; "
                "expected one number per sample, or one list of numbers per sample"
            )
        if dense and len(values) < lengths[i]:
            raise ValueError(
                f"reward {name!r} returned {len(values)} values for the {lengths[i]} tokens of {sample(i)}"
            )
        values = values[: lengths[i]] if dense else values
        if not np.isfinite(values).all():
            bad = values[~np.isfinite(values)].flat[0] if dense else values
            raise ValueError(f"reward {name!r} returned {bad} for {sample(i)}")
        if dense:
            result[i, : lengths[i]] = values
        else:
            result[i] = values
    return result


def _accepted(reward: AnyReward, given: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a builtin without a signature: pass it everything
        return given
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def _short(text: str, width: int = 80) -> str:
    return repr(text if len(text) <= width else text[: width - 3] + "...")


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, stopped: bool, *, append_eos: bool = True) -> list[int]:
    """Token ids of a text for a reward model, by its own tokenizer.

    Args:
        stopped: whether the response ended by itself.
        append_eos: make the ids end in the tokenizer's EOS exactly if ``stopped`` (a trailing EOS that the
            tokenizer adds to every text is taken off first). False leaves the ids as the tokenizer wraps
            them.
    """
    ids: list[int] = tokenizer(text)["input_ids"]
    eos = tokenizer.eos_token_id
    if append_eos and eos is not None:
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        if stopped:
            ids = [*ids, eos]
    return ids


def pools_last_token(model: nn.Module) -> bool:
    """Whether a classification model is of the decoder kind: a linear ``score`` on the last token's hidden state."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def raw_scores(model: PreTrainedModel, ids: Tensor, pad_token_id: int = 0) -> Tensor:
    """A sequence-classification model's scores, differentiable.

    The last token of a decoder-style head is found **by place**. The stock heads look for the last id that
    differs from the pad id, and so skip a real EOS where pad and EOS share an id.

    Args:
        ids: ``(N, L)`` int64, right-padded with -1; at least one token a row.
        pad_token_id: put where there is no token; masked, so its value only matters to encoders that derive
            positions from it.

    Returns:
        ``(N,)``: the logit of a one-label model, the log-odds ``logit 1 - logit 0`` of a two-label one.
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
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


class LearnedReward:
    """A transformers sequence-classification model as a reward, over a text bridge: it has its own tokenizer.

    A text is prompt and completion, joined as they are. For decoder-style models the tokenizer's EOS follows
    if and only if the response stopped; for encoders the tokenizer wraps the text its usual way. A text longer
    than the model's context loses the start of its prompt (leading special tokens stay), with one warning.

    Args:
        model: any ``AutoModelForSequenceClassification`` with one label (its logit is the score) or two (the
            log-odds are).
        tokenizer: the model's own.
        normalise: ``(mean, std)``: the reward is ``(score - mean) / std``.
        batch_size: texts per forward, at the most; texts of similar length go together.
        name: what messages and results call it.

    Raises:
        ValueError: the model has another number of labels, or std is not positive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        normalise: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 64,
        name: str = "reward_model",
    ) -> None:
        labels = model.config.num_labels
        if labels not in (1, 2):
            raise ValueError(
                f"reward model {name!r} has {labels} labels: "
                "a reward needs one (a score) or two (the log-odds of the second)"
            )
        mean, std = map(float, normalise)
        if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
            raise ValueError(f"normalise must be a finite mean and a positive std, got {normalise}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.tokenizer = fuse(model), tokenizer
        self.normalise, self.batch_size = (mean, std), batch_size
        self.__name__ = name
        self._warned = False

    @property
    def context(self) -> int | None:
        """The most tokens the model reads, None if its config does not say."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and self.model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
            limit -= self.model.config.pad_token_id + 1  # these number positions from the pad id onwards
        return limit

    def encode(self, text: str, stopped: bool) -> list[int]:
        """The ids the model reads for a text."""
        ids = encode_text(self.tokenizer, text, stopped, append_eos=pools_last_token(self.model))
        if not ids:
            raise ValueError(f"reward model {self.__name__!r}: text {_short(text)} has no tokens")
        limit = self.context
        if limit is not None and len(ids) > limit:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"reward model {self.__name__!r} reads {limit} tokens: of longer texts it does not see the start",
                    stacklevel=2,
                )
            special = set(self.tokenizer.all_special_ids)
            lead = next((i for i, token in enumerate(ids) if token not in special), 0)
            ids = ids[:lead] + ids[len(ids) - (limit - lead) :]
        return ids

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        finish_reasons: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One reward per sample; without ``finish_reasons`` every response counts as stopped."""
        reasons = ["stop"] * len(completions) if finish_reasons is None else finish_reasons
        rows = [
            self.encode(prompt + completion, reason == "stop")
            for prompt, completion, reason in zip(prompts, completions, reasons, strict=True)
        ]
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
            scores[chosen] = raw_scores(self.model, ids, pad if pad is not None else 0).double().cpu().numpy()
        mean, std = self.normalise
        return ((scores - mean) / std).tolist()


def right_pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """``(N, longest)`` int64, each row from the left, -1 after it."""
    out = torch.full((len(rows), max(map(len, rows), default=0)), -1, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return out


class WeightedSum:
    """``sum_k weight_k * reward_k``. Where one part is dense, the others land on the response's last token.

    Args:
        parts: ``(weight, reward)`` pairs, at least one.
    """

    def __init__(self, parts: Sequence[tuple[float, AnyReward]]) -> None:
        if not parts:
            raise ValueError("a weighted sum needs at least one (weight, reward) pair")
        self.parts = list(parts)
        self.__name__ = " + ".join(f"{weight:g}*{reward_name(reward)}" for weight, reward in self.parts)

    def __call__(self, **given: Any) -> NDArray[np.float64]:
        """As any reward; every part is validated by itself, so a message names the part at fault."""
        found = [(weight, call_reward(reward, **given)) for weight, reward in self.parts]
        if all(values.ndim == found[0][1].ndim for _, values in found):
            return np.sum([weight * values for weight, values in found], axis=0)
        lengths = np.array([len(ids) for ids in given["completion_ids"]])
        total = np.zeros((len(lengths), lengths.max(initial=0)))
        for weight, values in found:
            if values.ndim == 2:
                total += weight * values
            else:
                total[np.arange(len(lengths)), lengths - 1] += weight * values
        return total


class Clip:
    """``min(max(reward, low), high)``, per number the reward gives."""

    def __init__(self, reward: AnyReward, low: float, high: float) -> None:
        if not low < high:
            raise ValueError(f"clip needs low < high, got {low} and {high}")
        self.reward, self.low, self.high = reward, low, high
        self.__name__ = f"clip({reward_name(reward)}, {low:g}, {high:g})"

    def __call__(self, **given: Any) -> NDArray[np.float64]:
        """As any reward."""
        return call_reward(self.reward, **given).clip(self.low, self.high)


class Standardise:
    """``(reward - mean) / std``, with the moments of the reference's samples; for rewards of one number per
    response.

    Dense rewards are refused: a shift of each token's reward would pay for length.

    Raises:
        ValueError: std is not positive, or, when called, the reward is dense.
    """

    def __init__(self, reward: AnyReward, mean: float, std: float) -> None:
        if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
            raise ValueError(f"standardise needs a finite mean and a positive std, got {mean} and {std}")
        self.reward, self.mean, self.std = reward, mean, std
        self.__name__ = f"standardise({reward_name(reward)})"

    @classmethod
    def against(cls, reward: AnyReward, **samples: Any) -> Standardise:
        """Take the moments (population std) from samples of the reference, given as to :func:`call_reward`."""
        values = call_reward(reward, **samples)
        if values.ndim == 2:
            raise ValueError(f"reward {reward_name(reward)!r} is dense: standardising it would pay for length")
        return cls(reward, float(values.mean()), float(values.std()))

    def __call__(self, **given: Any) -> NDArray[np.float64]:
        """As any reward."""
        values = call_reward(self.reward, **given)
        if values.ndim == 2:
            raise ValueError(f"reward {reward_name(self.reward)!r} is dense: standardising it would pay for length")
        return (values - self.mean) / self.std
