"""Trajectories: the one thing agents learn from, for language models and control alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lm_envs.model.tokens import left_pad, right_pad

_PER_STEP = ("logprob", "reward", "ref_logprob")
_PER_EPISODE = ("terminated", "truncated", "group", "prompt_index", "sampled_by", "score", "rank")
_ROWS = ("obs", "final_obs", "prompt", "response")
_DTYPES = dict.fromkeys(("mask", "terminated", "truncated"), torch.bool) | dict.fromkeys(
    ("group", "rank", "prompt_index", "prompt", "response"), torch.int64
)
_PADDING = {"prompt": -1, "response": -1, "obs": -1}  # what fills a row that is widened; zero elsewhere


class Rows(Protocol):
    """Rows that are Trajectories once they are selected: in memory, or on disk until then."""

    def __len__(self) -> int: ...

    def select(self, index: Tensor | slice) -> Trajectories: ...


@dataclass
class Trajectories:
    """A padded batch of B episodes (or fragments of episodes) of at most T steps.

    Real steps come first in each row; what lies beyond them may hold anything, NaN included, and must change nothing.
    Demonstrations are trajectories without ``reward``; preferences are groups with a ``rank``.

    Attributes:
        actions: ``(B, T)`` int64; in a bandit env ``(B, 1, T_response)``, the whole response as one action.
        mask: ``(B, T)`` bool, True on real actions, a prefix of every row and never empty.
        terminated: ``(B,)`` bool, the episode really ended: its future is worth zero.
        truncated: ``(B,)`` bool, cut by a time limit or by the collector: bootstrap from ``final_obs``.
        obs: opaque to algorithms; only the policy reads it. Control: ``(B, T, *shape)``. Text: ``(B, P + T)``, the
            final observation, of which every earlier one is a prefix.
        final_obs: control only, ``(B, *shape)``, what was seen after the last action.
        logprob: ``(B, T)`` log-probability under the distribution that was sampled from, nats.
        reward: ``(B, T)``.
        value: ``(B, T + 1)`` the sampling policy's values, where they came with the sampling; 0 after termination.
        ref_logprob: ``(B, T)`` log-probability of the same actions under the frozen reference, nats.
        group: ``(B,)`` int64, rows with the same number share a prompt.
        prompt_index: ``(B,)`` int64, which row of the task's prompts an episode starts from.
        sampled_by: ``(B,)`` int64, the number of the weights that sampled a row: equal numbers, equal weights.
        score: ``(B,)`` the reward model's score before the KL penalty.
        prompt: ``(B, P)`` int64, left-padded with -1.
        response: ``(B, T_response)`` int64, right-padded with -1; the EOS is part of it.
        rank: ``(B,)`` int64 within the group, 0 is the best.

    Raises:
        ValueError: a field has the wrong shape or dtype; the message names it.
    """

    actions: Tensor
    mask: Tensor
    terminated: Tensor
    truncated: Tensor
    obs: Tensor | None = None
    final_obs: Tensor | None = None
    logprob: Tensor | None = None
    reward: Tensor | None = None
    ref_logprob: Tensor | None = None
    value: Tensor | None = None
    group: Tensor | None = None
    prompt_index: Tensor | None = None
    sampled_by: Tensor | None = None
    score: Tensor | None = None
    prompt: Tensor | None = None
    response: Tensor | None = None
    rank: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask.ndim != 2:
            raise ValueError(f"Trajectories.mask must be (B, T), got shape {tuple(self.mask.shape)}")
        rows, steps = self.mask.shape
        begin = dict.fromkeys(("actions", *_PER_STEP), (rows, steps)) | dict.fromkeys(_ROWS, (rows,))
        whole = {"value": (rows, steps + 1), **dict.fromkeys(_PER_EPISODE, (rows,))}
        for name, shape in (begin | whole).items():
            have = None if getattr(self, name) is None else tuple(getattr(self, name).shape)
            if have is not None and (have if name in whole else have[: len(shape)]) != shape:
                how = "be" if name in whole else "start with"
                raise ValueError(f"Trajectories.{name} must {how} {shape}, got shape {have}")
        for name, dtype in _DTYPES.items():
            value = getattr(self, name)
            if value is not None and value.dtype != dtype:
                raise ValueError(f"Trajectories.{name} must be {str(dtype)[6:]}, got {value.dtype}")
        if bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any()):
            row = int((self.mask[:, 1:] & ~self.mask[:, :-1]).any(dim=1).nonzero()[0])
            raise ValueError(f"Trajectories.mask must be a prefix of every row; row {row} has a gap")
        if rows and (steps == 0 or not bool(self.mask[:, 0].all())):
            raise ValueError("Trajectories.mask: every row needs at least one real action")
        if bool((self.terminated & self.truncated).any()):
            raise ValueError("Trajectories: a row cannot be both terminated and truncated; a real end is terminated")

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def lengths(self) -> Tensor:
        """``(B,)`` int64, real steps per row."""
        return self.mask.sum(dim=1)

    @property
    def is_bandit(self) -> bool:
        """Whether one action is a whole response."""
        return self.actions.ndim == 3

    @property
    def response_lengths(self) -> Tensor:
        """``(B,)`` int64, generated tokens per row, the EOS included; for control the number of steps."""
        return self.lengths if self.response is None else (self.response >= 0).sum(dim=1)

    def _map(self, fn: Callable[[str, Tensor], Tensor]) -> Trajectories:
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: fn(name, value) for name, value in present.items()})

    def select(self, index: Tensor | slice) -> Trajectories:
        """The rows of ``index`` (int64 indices, a bool mask or a slice), in that order."""
        return self._map(lambda _, value: value[index])

    def to(self, device: torch.device | str) -> Trajectories:
        """The same on another device."""
        return self._map(lambda _, value: value.to(device))

    def trim(self, *, prompt: bool = False) -> Trajectories:
        """Without the columns beyond the longest row: a minibatch should not pay for rows it does not hold.

        Args:
            prompt: also cut the columns before the longest prompt, so that P may differ from the env's.
        """
        steps = int(self.lengths.max())
        tokens = int(self.response_lengths.max())
        width = self.mask.shape[1]
        empty = 0
        if prompt and self.prompt is not None:
            empty = int(((self.prompt >= 0).any(dim=0).cumsum(0) == 0).sum())

        def cut(name: str, value: Tensor) -> Tensor:
            if name == "response":
                return value[:, :tokens]
            if name == "prompt":
                return value[:, empty:]
            if name == "value":
                return value[:, : steps + 1]
            if name == "obs" and self.prompt is not None:
                return value[:, empty : self.prompt.shape[1] + tokens]
            if name == "actions" and self.is_bandit:
                return value[:, :, :tokens]
            if name in ("actions", "mask", "obs", *_PER_STEP) and value.shape[1] == width:
                return value[:, :steps]
            return value

        return self._map(cut)

    def flatten(self) -> Trajectories:
        """Every real step as a row of its own with T=1 (feed-forward policies; not for text).

        Rows are marked terminated: their value after the step is not asked for, the targets are computed before.
        """
        if self.prompt is not None:
            raise ValueError("Trajectories.flatten is for control: a step of a text depends on the whole row")
        kept = {
            name: getattr(self, name)[self.mask].unsqueeze(1)
            for name in ("actions", "obs", *_PER_STEP)
            if getattr(self, name) is not None
        }
        count = int(self.mask.sum())
        true = torch.ones(count, dtype=torch.bool, device=self.mask.device)
        return Trajectories(mask=true.unsqueeze(1), terminated=true, truncated=~true, **kept)

    @staticmethod
    def concatenate(parts: Sequence[Trajectories]) -> Trajectories:
        """One batch of all rows, padded to the longest. Fields that not every part has are dropped."""
        if not parts:
            raise ValueError("Trajectories.concatenate needs at least one part")

        def join(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values):
                return None
            if values[0].ndim < 2 or name == "final_obs":
                return torch.cat(values)
            # Only the axes that count steps differ: T, or the tokens of a bandit's response.
            shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
            padded = []
            for value in values:
                extra = [size - have for size, have in zip(shape, value.shape[1:], strict=True)]
                sides = [side for more in reversed(extra) for side in ((more, 0) if name == "prompt" else (0, more))]
                padded.append(F.pad(value, sides, value=_PADDING.get(name, 0)))
            return torch.cat(padded)

        joined: dict[str, Any] = {f.name: join(f.name) for f in fields(Trajectories)}
        widths = {part.prompt.shape[1] for part in parts if part.prompt is not None}
        if joined["prompt"] is not None and len(widths) > 1:
            # obs holds the prompt in its first P places: rebuild it, or P would differ between rows.
            joined["obs"] = torch.cat([joined["prompt"], joined["response"]], dim=1)
        return Trajectories(**joined)


def demonstrations(
    texts: Sequence[Sequence[int]], prompt_length: int, max_new_tokens: int, group: Sequence[int] | None = None
) -> Trajectories:
    """Texts as Trajectories of the MDP env, with no reward.

    Args:
        texts: token ids, the EOS included where the response ended; ValueError without one behind the prompt.
        prompt_length: how many tokens of each text are its prompt.
        max_new_tokens: longer responses are cut there.
        group: a number per text, equal where they share a prompt.
    """
    for i, text in enumerate(texts):
        if len(text) <= prompt_length:
            raise ValueError(
                f"text {i} has {len(text)} tokens and its prompt {prompt_length}: nothing is left to learn"
            )
    return from_responses(
        [text[:prompt_length] for text in texts],
        [text[prompt_length : prompt_length + max_new_tokens] for text in texts],
        prompt_length,
        group,
    )


def from_responses(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    prompt_length: int,
    group: Sequence[int] | None = None,
) -> Trajectories:
    """Prompts of at most ``prompt_length`` token ids, and responses of at least one, as :func:`demonstrations`."""
    prompt = torch.from_numpy(left_pad(prompts, prompt_length))
    response = right_pad(responses)
    mask = response >= 0
    ended = torch.ones(len(response), dtype=torch.bool)
    return Trajectories(
        actions=response.clamp(min=0),
        mask=mask,
        terminated=ended,
        truncated=~ended,
        obs=torch.cat([prompt, response], dim=1),
        prompt=prompt,
        response=response,
        group=None if group is None else torch.as_tensor(group, dtype=torch.int64),
    )
