"""Rewards made from the text form that :mod:`lm_envs.reward.specs` parses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from lm_envs.model.loading import HOST, Placement
from lm_envs.plugins import find, told
from lm_envs.reward.base import AnyReward, Clip, Conversational, WeightedSum
from lm_envs.reward.judge import load_judge, make_judge
from lm_envs.reward.learned import load_reward_model
from lm_envs.reward.metrics import make_metric
from lm_envs.reward.specs import Source, Spec
from lm_envs.reward.units import Samples, in_units_of, standardised

__all__ = ["build_reward"]


def build_reward(
    spec: Spec,
    *,
    samples: Callable[[], Samples] | None = None,
    batch_size: int = 64,
    conversational: bool = False,
    what: str = "reward model",
    placement: Placement = HOST,
) -> AnyReward:
    """Load a reward's models, run its files, and compose it.

    Args:
        spec: from :func:`~lm_envs.reward.specs.parse_reward`.
        samples: makes samples of the reference, for ``standardise`` without numbers; called at most once.
        batch_size: texts per forward of a learned model.
        conversational: prompts are chat messages, which the user's functions receive as from TRL.
        what: a learned model's name in messages.
        placement: device and precision of learned models.

    Raises:
        ImportError: a metric's library is not installed.
        ValueError: a model cannot be loaded, a file fails or has no such function, a setting does not exist, or a
            standardized part gives every sample the same score.
    """
    make_samples = None if samples is None else functools.cache(samples)

    def build(spec: Spec) -> AnyReward:
        if isinstance(spec, Source):
            return source(spec)
        parts = [build(part) for part in spec.parts]
        reward = parts[0]
        if spec.how == "sum":
            return WeightedSum(list(zip(spec.numbers, parts, strict=True)))
        if spec.how == "clip":
            return Clip(reward, *spec.numbers)
        if spec.how == "chat":
            return reward if isinstance(reward, Conversational) else Conversational(reward)
        if spec.numbers:
            return standardised(reward, *spec.numbers)
        if make_samples is None:
            raise ValueError("standardise needs mean and std here: there are no samples of a reference to take them of")
        return in_units_of(reward, make_samples())

    def source(spec: Source) -> AnyReward:
        if spec.kind == "metric":
            return make_metric(spec.place, **spec.settings)
        if spec.kind == "judge":
            return make_judge(spec.place, spec.name, **spec.settings) if spec.name else load_judge(spec.place)
        if spec.kind == "model":
            if wrong := [name for name in spec.settings if name not in ("label", "output", "template", "batch_size")]:
                raise ValueError(f"reward model:{spec.place} takes label, output and template, not {', '.join(wrong)}")
            return load_reward_model(spec.place, what, placement, **{"batch_size": batch_size, **spec.settings})
        found = _function(spec)
        return Conversational(found) if conversational else found

    return build(spec)


def _function(spec: Source) -> AnyReward:
    text = f"{spec.place}:{spec.name}"
    found, where = find(text, "reward"), f"reward {text}"
    if isinstance(found, type):
        try:
            found = found(**spec.settings)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{where}: the class cannot be made: {told(error)}") from error
        if not callable(found):
            raise ValueError(f"{where}: the class has no method __call__, which scores completions")
    elif spec.settings:
        try:
            inspect.signature(found).bind_partial(**spec.settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: its settings: {told(error)}") from error
        found = functools.partial(found, **spec.settings)
    return found
