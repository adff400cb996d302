"""Rewards: the calling convention, its validation, and compositions.

A reward is any callable in the convention of TRL's reward functions::

    reward(prompts=[...], completions=[...], completion_ids=[[...]], finish_reasons=["stop", "length"],
    **columns)

with one entry per sample in each list, that returns one number per sample, or one per response token (a dense
reward). Texts have no special tokens; ``completion_ids`` include the EOS of a response that stopped; ``columns`` are
those of the prompts' data. A reward receives the arguments that its signature names, and may be ``async``. None in
place of a number means that the reward does not apply to that sample; in a weighted sum at least one part must apply.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lm_envs.printable import one_line
from lm_envs.processes import group
from lm_envs.reward.waiting import finished

RESERVED = ("prompts", "completions", "completion_ids", "finish_reasons")  # names that no column may have


class Reward(Protocol):
    """Anything that scores completions by the module's convention."""

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> Sequence[float | None] | Sequence[Sequence[float] | None] | NDArray[Any] | Tensor | Awaitable[Any]:
        """Return one number per sample, or one per response token."""
        ...


AnyReward = Reward | Callable[..., Any]


def reward_name(reward: AnyReward) -> str:
    """Return its ``__name__``, that of the function in a partial, or its class's."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return str(getattr(reward, "__name__", type(reward).__name__))


def said(completion: Any) -> str:
    """Return the text of a completion, given as text or as messages (see :class:`Conversational`)."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def leaves(reward: AnyReward) -> Iterator[AnyReward]:
    """Yield the rewards in a composition, or the reward itself if it is none."""
    if isinstance(reward, WeightedSum):
        for _, part in reward.parts:
            yield from leaves(part)
    elif isinstance(reward, (Clip, Standardise, Conversational)):
        yield from leaves(reward.reward)
    else:
        yield reward


def is_dense(reward: AnyReward) -> bool:
    """Whether a reward, or a part of it, declares by its attribute ``dense`` that it pays per token."""
    return any(getattr(part, "dense", False) for part in leaves(reward))


def dense_part(reward: AnyReward) -> AnyReward:
    """Return the part of a dense reward that pays before the end, without parts that pay once per response."""
    if isinstance(reward, WeightedSum):
        return WeightedSum([(weight, dense_part(part)) for weight, part in reward.parts if is_dense(part)])
    if isinstance(reward, Clip):
        return Clip(dense_part(reward.reward), reward.low, reward.high)
    return Conversational(dense_part(reward.reward)) if isinstance(reward, Conversational) else reward


def call_reward(
    reward: AnyReward,
    /,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    finish_reasons: Sequence[str],
    **columns: Sequence[Any],
) -> NDArray[np.float64]:
    """Call a reward on N samples and check its result.

    Returns:
        ``(N,)`` float64, or ``(N, T)`` for a dense reward: T is the longest response, 0 beyond a response's end.

    Raises:
        ValueError: the reward requires a missing column, raises, exits, or returns other than N finite numbers or N
            rows as long as their responses. The message names the reward and the sample.
    """
    given = dict(zip(RESERVED, (prompts, completions, completion_ids, finish_reasons), strict=True))
    found = scores_or_nan(reward, {**given, **columns})
    missing = _missing(found)
    if missing.any():
        i = int(missing.argmax())
        every = "every part of " if isinstance(reward, WeightedSum) else ""
        raise ValueError(
            f"{every}reward {reward_name(reward)!r} returned None for {_sample(given, i)}: "
            "None says that a reward does not apply, and here no other one does"
        )
    return found


def scores_or_nan(reward: AnyReward, given: Mapping[str, Sequence[Any]]) -> NDArray[np.float64]:
    """Like :func:`call_reward`, with NaN (a whole row) for each sample to which the reward does not apply."""
    name, lengths = reward_name(reward), [len(ids) for ids in given["completion_ids"]]
    raw = _returned(reward, name, given)
    if isinstance(raw, Tensor):
        raw = raw.detach().cpu().double().numpy()
    try:
        if isinstance(raw, (str, bytes, Mapping, Set)):  # iterable, but not over numbers in order
            raise TypeError
        rows = list(raw)
    except TypeError:
        raise ValueError(f"reward {name!r} returned a {type(raw).__name__}, not a list of numbers") from None
    if len(rows) != len(lengths):
        raise ValueError(f"reward {name!r} returned {len(rows)} rewards for {len(lengths)} samples")

    def refused(what: str, i: int, why: str = "") -> ValueError:
        return ValueError(f"reward {name!r} returned {what} {_sample(given, i)}{why}")

    found: list[NDArray[np.float64] | None] = []
    for i, row in enumerate(rows):
        try:
            found.append(None if row is None else _numbers(row))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise refused(f"{_short(row)} for", i, ", which is not a number") from None
    dense = next((values.ndim for values in found if values is not None), 0) == 1
    result = np.full((len(rows), max(lengths)) if dense else len(rows), np.nan)
    for i, values in enumerate(found):
        if values is None:
            continue
        if values.ndim != dense:
            expected = "expected one number per sample, or one list of numbers per sample"
            raise refused(f"an entry of shape {values.shape} for", i, f"; {expected}")
        if dense and len(values) < lengths[i]:
            raise refused(f"{len(values)} values for the {lengths[i]} tokens of", i)
        values = values[: lengths[i]] if dense else values
        if not np.isfinite(values).all():
            raise refused(f"{values[~np.isfinite(values)].flat[0]} for", i)
        result[i] = np.pad(values, (0, result.shape[1] - lengths[i])) if dense else values
    return result


def _numbers(row: Any) -> NDArray[np.float64]:
    """Convert one entry; TypeError for texts, complex numbers and dates, which NumPy would convert."""
    values = row.detach().cpu().double().numpy() if isinstance(row, Tensor) else np.asarray(row)
    if values.dtype.kind not in "biufO":
        raise TypeError
    return values.astype(np.float64)


def _returned(reward: AnyReward, name: str, given: Mapping[str, Sequence[Any]]) -> Any:
    """Call the reward; add the place and the sample to errors of a user's function."""
    accepted = _accepted(reward, given)
    try:
        return _call(reward, accepted)
    except (Exception, SystemExit) as error:
        ours = getattr(reward, "__module__", None) or type(reward).__module__
        if ours.split(".")[0] == "lm_envs":
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = "called sys.exit" if isinstance(error, SystemExit) else f"raised {type(error).__name__}"
        where = f"{last.filename}, line {last.lineno}, in {last.name}"
        culprit = _culprit(reward, accepted, given, error)
        raise ValueError(f"reward {name!r} {what}: {one_line(str(error), 300)} ({where}) for {culprit}") from error


def _call(reward: AnyReward, given: Mapping[str, Any]) -> Any:
    raw = reward(**given)
    raw = finished(raw) if inspect.isawaitable(raw) else raw
    return list(raw) if isinstance(raw, Iterator) else raw  # a generator runs the user's code only now


def _culprit(
    reward: AnyReward, accepted: Mapping[str, Sequence[Any]], given: Mapping[str, Sequence[Any]], error: BaseException
) -> str:
    """Find the sample that raises the error alone, by halving the batch; else return the number of samples."""

    def raises(start: int, stop: int) -> bool:
        try:
            _call(reward, {name: values[start:stop] for name, values in accepted.items()})
        except (Exception, SystemExit) as again:  # noqa: BLE001, from the user's code
            return type(again) is type(error)
        return False

    start, stop = 0, len(given["completions"])
    whole = f"a batch of {stop} samples"
    if stop == 0 or isinstance(error, OSError):  # the network's or the disk's fault, not a sample's
        return whole
    while stop - start > 1:
        middle = (start + stop) // 2
        if raises(start, middle):
            stop = middle
        elif raises(middle, stop):
            start = middle
        else:
            return whole
    return _sample(given, start)


def _accepted(reward: AnyReward, given: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a builtin without a signature: pass it everything
        return dict(given)
    given = {name: values for name, values in given.items() if name not in _bound(reward)}
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for p in named:
        if p.default is p.empty and p.name not in given:
            columns = [name for name in given if name not in RESERVED]
            raise ValueError(
                f"reward {reward_name(reward)!r} needs {p.name!r}, and the prompts' data have no such column: "
                f"they have {', '.join(columns) or 'none beside the prompt'}"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(given)
    return {p.name: given[p.name] for p in named if p.name in given}


def _bound(reward: AnyReward) -> set[str]:
    """Return the parameters that are bound already: a partial's settings, and ``self`` of a method."""
    names: set[str] = set()
    while isinstance(reward, functools.partial):
        names |= set(reward.keywords)
        reward = reward.func
    method = getattr(reward, "__func__", None if inspect.isroutine(reward) else type(reward).__call__)
    first = next(iter(inspect.signature(method).parameters.values()), None) if inspect.isfunction(method) else None
    return names | {first.name} if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else names


def _sample(given: Mapping[str, Sequence[Any]], i: int) -> str:
    return f"sample {i} (prompt {_short(given['prompts'][i])}, completion {_short(given['completions'][i])})"


def _short(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    return one_line(repr(value), 80)


Rewards = NDArray[np.float64] | list[Any]


def _with_nones(values: NDArray[np.float64]) -> Rewards:
    """Turn NaN into None again, for callers that use the composition as a reward."""
    missing = _missing(values)
    return [None if m else v for v, m in zip(values, missing.tolist(), strict=True)] if missing.any() else values


def _missing(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return ``(N,)`` bool: whether a reward, or any token of a dense one, is NaN."""
    return np.asarray(np.isnan(values).any(axis=tuple(range(1, values.ndim))))


class WeightedSum:
    """The sum ``sum_k weight_k * reward_k`` over the ``(weight, reward)`` pairs that apply; None if none does.

    If one part is dense, the others are added at the response's last token. ValueError without parts, or if a weight is
    not finite.
    """

    def __init__(self, parts: Sequence[tuple[float, AnyReward]]) -> None:
        if not parts:
            raise ValueError("a weighted sum needs at least one (weight, reward) pair")
        for weight, reward in parts:
            if not np.isfinite(weight):
                raise ValueError(f"reward {reward_name(reward)!r} has the weight {weight}: it must be finite")
        self.parts = list(parts)
        self.seen = np.zeros((len(self.parts), 2))  # of each part: its sum over samples, and their number
        self.__name__ = " + ".join(f"{weight:g}*{reward_name(reward)}" for weight, reward in self.parts)

    def __call__(self, /, **given: Any) -> Rewards:
        """Score samples; messages name the part at fault."""
        found = [(weight, scores_or_nan(reward, given)) for weight, reward in self.parts]
        lengths = np.array([len(ids) for ids in given["completion_ids"]], dtype=np.int64)
        dense = any(values.ndim == 2 for _, values in found)
        total = np.zeros((len(lengths), lengths.max(initial=0)) if dense else len(lengths))
        applies = np.zeros(len(lengths), dtype=bool)
        for part, (weight, values) in enumerate(found):
            mine = ~_missing(values)
            applies |= mine
            self.seen[part] += values[mine].sum(), mine.sum()
            if values.ndim == total.ndim:
                total[mine] += weight * values[mine]
            else:
                total[mine, lengths[mine] - 1] += weight * values[mine]
        total[~applies] = np.nan
        return _with_nones(total)


def part_means(reward: AnyReward) -> dict[str, float]:
    """Return the mean of each part of a weighted sum over the samples since :func:`forget_parts`, on all processes that
    share work: ``part_NAME``, without its weight, where the part applied; per response if it is dense."""
    found: dict[str, float] = {}
    for whole in _sums(reward):
        seen = np.sum(group.exchange(whole.seen, "the parts of the reward"), axis=0)
        for (_, part), (total, count) in zip(whole.parts, seen, strict=True):
            name = f"part_{reward_name(part)}"
            again = f"{name} ({sum(other.startswith(name) for other in found) + 1})" if name in found else name
            if count:
                found[again] = float(total / count)
    return found


def forget_parts(reward: AnyReward) -> None:
    """Begin :func:`part_means` again."""
    for whole in _sums(reward):
        whole.seen[:] = 0


def _sums(reward: AnyReward) -> Iterator[WeightedSum]:
    """Yield the outermost weighted sum, if there is one."""
    if isinstance(reward, WeightedSum):
        yield reward
    elif isinstance(reward, (Clip, Standardise, Conversational)):
        yield from _sums(reward.reward)


class Clip:
    """A clipped reward, ``min(max(reward, low), high)`` for each number of the reward."""

    def __init__(self, reward: AnyReward, low: float, high: float) -> None:
        if not low < high:
            raise ValueError(f"clip needs low < high, got {low} and {high}")
        self.reward, self.low, self.high = reward, low, high
        self.__name__ = f"clip({reward_name(reward)}, {low:g}, {high:g})"

    def __call__(self, /, **given: Any) -> Rewards:
        """Score samples."""
        return _with_nones(scores_or_nan(self.reward, given).clip(self.low, self.high))


class Standardise:
    """A standardized reward, ``(reward - mean) / std``; :func:`lm_envs.reward.units.in_units_of` takes the moments from
    samples.

    ValueError if std is not positive, or, when called, if the reward is dense: a shift of each token's reward would pay
    for length.
    """

    def __init__(self, reward: AnyReward, mean: float, std: float) -> None:
        if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
            raise ValueError(
                f"standardizing {reward_name(reward)!r} needs a finite mean and a positive std, got {mean} and {std}"
            )
        self.reward, self.mean, self.std = reward, mean, std
        self.__name__ = f"standardise({reward_name(reward)})"

    def __call__(self, /, **given: Any) -> Rewards:
        """Score samples."""
        values = scores_or_nan(self.reward, given)
        if values.ndim == 2:
            raise ValueError(f"reward {reward_name(self.reward)!r} is dense: standardizing it would pay for length")
        return _with_nones((values - self.mean) / self.std)


class Conversational:
    """A reward that reads messages, as TRL passes them for conversations.

    Prompts become lists of ``{"role": ..., "content": ...}``: the column ``messages`` if there is one, else a user's
    message with the prompt's text. Each completion is a list of one assistant's message.
    """

    def __init__(self, reward: AnyReward) -> None:
        self.reward = reward
        self.__name__ = reward_name(reward)

    def __call__(self, /, prompts: Sequence[str], completions: Sequence[str], **given: Any) -> Rewards:
        """Score samples given as texts."""
        messages = given.get("messages") or [[{"role": "user", "content": text}] for text in prompts]
        replies = [[{"role": "assistant", "content": text}] for text in completions]
        return _with_nones(scores_or_nan(self.reward, {**given, "prompts": messages, "completions": replies}))
