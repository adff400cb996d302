"""Trajectories, from which all agents learn, for language models and control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lm_envs.model.tokens import left_pad, right_pad

_PER_STEP = ("logprob", "reward", "ref_logprob")
_PER_EPISODE = ("terminated", "truncated", "group", "prompt_index", "sampled_by", "score", "rank", "weight")
_ROWS = ("obs", "final_obs", "prompt", "response")
_DTYPES = dict.fromkeys(("mask", "terminated", "truncated"), torch.bool) | dict.fromkeys(
    ("group", "rank", "prompt_index", "prompt", "response"), torch.int64
)
_PADDING = {"prompt": -1, "response": -1, "obs": -1}  # the fill of wider rows; zero for other fields


class Rows(Protocol):
    """Rows in memory or on disk that :meth:`select` returns as Trajectories."""

    def __len__(self) -> int: ...

    def select(self, index: Tensor | slice) -> Trajectories: ...


@dataclass
class Trajectories:
    """A padded batch of B episodes (or fragments of episodes) of at most T steps.

    Real steps come first in each row; values beyond them, which may be NaN, must change nothing. Demonstrations are
    trajectories without ``reward``; preferences are groups with a ``rank``.

    Attributes:
        actions: ``(B, T)`` int64; in a bandit env ``(B, 1, T_response)``, the whole response as one action.
        mask: ``(B, T)`` bool, True on real actions, a prefix of every row and never empty.
        terminated: ``(B,)`` bool, the episode really ended: its future is worth zero.
        truncated: ``(B,)`` bool, cut by a time limit or by the collector: bootstrap from ``final_obs``.
        obs: read by the policy alone. Control: ``(B, T, *shape)``. Text: ``(B, P + T)``, the final observation, of
            which every earlier one is a prefix.
        final_obs: control only, ``(B, *shape)``, the observation after the last action.
        logprob: ``(B, T)`` log-probability under the distribution that was sampled from, nats.
        reward: ``(B, T)``.
        value: ``(B, T + 1)`` the sampling policy's values, if sampling computed them; 0 after termination.
        ref_logprob: ``(B, T)`` log-probability of the same actions under the frozen reference, nats.
        group: ``(B,)`` int64, rows with the same number share a prompt.
        prompt_index: ``(B,)`` int64, the row of the task's prompts that an episode starts from.
        sampled_by: ``(B,)`` int64, the number of the weights that sampled a row.
        score: ``(B,)`` the reward model's score before the KL penalty.
        prompt: ``(B, P)`` int64, left-padded with -1.
        response: ``(B, T_response)`` int64, right-padded with -1; the EOS is part of it.
        rank: ``(B,)`` int64 within the group, 0 is the best; of a labeled response on its own 0 if wanted, else 1.
        weight: ``(B,)`` of its group in a loss that learns from ranks; None for 1.

    ValueError names a field of the wrong shape or dtype.
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
    weight: Tensor | None = None

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
        """The number of real steps per row, ``(B,)`` int64."""
        return self.mask.sum(dim=1)

    @property
    def is_bandit(self) -> bool:
        """Whether one action is a whole response."""
        return self.actions.ndim == 3

    @property
    def response_lengths(self) -> Tensor:
        """The number of generated tokens per row, EOS included, ``(B,)`` int64; for control, of steps."""
        return self.lengths if self.response is None else (self.response >= 0).sum(dim=1)

    def _map(self, fn: Callable[[str, Tensor], Tensor]) -> Trajectories:
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: fn(name, value) for name, value in present.items()})

    def select(self, index: Tensor | slice) -> Trajectories:
        """Return the rows of ``index`` (int64 indices, a bool mask or a slice), in that order."""
        return self._map(lambda _, value: value[index])

    def to(self, device: torch.device | str) -> Trajectories:
        """Return the trajectories on another device."""
        return self._map(lambda _, value: value.to(device))

    def trim(self, *, prompt: bool = False) -> Trajectories:
        """Cut the columns beyond the longest row, and with ``prompt`` those before the longest prompt, so that P may
        differ from the env's."""
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
        """Return every real step as a row with T=1, for feed-forward policies, not for text.

        Rows are marked terminated: targets were computed before, so no value after the step is needed.
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
        """Join all rows into one batch, padded to the longest, with the fields that every part has."""
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
    """Return texts as Trajectories of the MDP env, without reward.

    Args:
        texts: token ids, with EOS if the response ended; ValueError if nothing follows the prompt.
        prompt_length: number of prompt tokens in each text.
        max_new_tokens: longer responses are cut.
        group: a number per text, equal for texts with the same prompt.
    """
    for i, text in enumerate(texts):
        if len(text) <= prompt_length:
            raise ValueError(f"text {i} has {len(text)} tokens, its prompt {prompt_length}: nothing is left to learn")
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
    """Return :func:`demonstrations` of prompts, at most ``prompt_length`` token ids each, and responses, at least
    one."""
    groups = None if group is None else torch.as_tensor(group, dtype=torch.int64)
    return whole_episodes(torch.from_numpy(left_pad(prompts, prompt_length)), right_pad(responses), group=groups)


def whole_episodes(prompt: Tensor, response: Tensor, **others: Any) -> Trajectories:
    """Return finished episodes of the MDP env: ``prompt (B, P)`` and ``response (B, T)``, padded with -1.

    Other fields are added; ``actions`` and ``mask`` replace those of the MDP env.
    """
    true = torch.ones(len(response), dtype=torch.bool)
    mdp: dict[str, Any] = {
        "actions": response.clamp(min=0),
        "mask": response >= 0,
        "obs": torch.cat([prompt, response], dim=1),
    }
    return Trajectories(**{**mdp, **others}, terminated=true, truncated=~true, prompt=prompt, response=response)
