"""Settings: what is accepted, what is refused, and how the refusal is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import MinLen

from lm_envs.settings import (
    Count,
    Finite,
    Name,
    NonNegative,
    Positive,
    Probability,
    Rate,
    Seed,
    SettingError,
    Settings,
    Size,
    Unique,
    Whole,
    check,
    make,
    near,
)


@dataclass(frozen=True)
class Plan(Settings):
    count: Count = 1
    whole: Whole | None = 0
    rows: Size = 1
    seed: Seed = 0
    finite: Finite = 0.0
    positive: Positive = 1.0
    some: NonNegative | None = None
    rate: Rate = 0.1
    share: Probability = 0.5
    names: Annotated[tuple[Name, ...], MinLen(1), Unique] = ("a",)
    mode: Literal["fast", "slow"] = "fast"
    flag: bool = False
    text: str | tuple[str, ...] = ""
    table: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs(Settings):
    path: str
    heads: Count = 2
    hidden: Count = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % self.heads:
            raise ValueError("hidden must be a multiple of heads")


@pytest.mark.parametrize(
    "name, given, kept",
    [
        ("count", 2**31 - 1, 2**31 - 1),
        ("count", 1e4, 10_000),  # as a command line writes it
        ("count", np.int64(3), 3),
        ("whole", None, None),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("positive", 2, 2.0),
        ("positive", np.float32(0.5), 0.5),
        ("some", 0, 0.0),
        ("rate", 1, 1.0),
        ("share", 0, 0.0),
        ("names", ["a", "b"], ("a", "b")),
        ("text", ["a"], ("a",)),
        ("mode", "slow", "slow"),
        ("table", {"a": [1]}, {"a": [1]}),
    ],
)
def test_what_belongs_there_is_kept_as_its_type(name: str, given: Any, kept: Any) -> None:
    for made in (Plan(**{name: given}), make(Plan, {name: given}, "plan"), replace(Plan(), **{name: given})):
        found = getattr(made, name)
        assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    "name, given, allowed",
    [
        ("count", 0, "at least 1"),
        ("count", 2**31, "at most 2147483647"),
        ("count", 1.5, "a whole number"),
        ("count", True, "a whole number"),
        ("count", "3", "a whole number"),
        ("count", None, "a whole number"),
        ("count", 0.0, "at least 1"),
        ("count", math.nan, "a whole number"),
        ("count", 10**4000, "at most 2147483647"),
        ("whole", -1, "at least 0 or none"),
        ("rows", 10**12, "at most 1048576"),
        ("seed", -1, "at least 0"),
        ("seed", 2**64, "below 9223372036854775808"),
        ("finite", math.inf, "a finite number"),
        ("finite", 10**400, "a number"),
        ("positive", 0, "above 0"),
        ("positive", math.nan, "a finite number"),
        ("positive", math.inf, "a finite number"),
        ("positive", True, "a number"),
        ("positive", "1", "a number"),
        ("some", -0.1, "at least 0 or none"),
        ("rate", 1e30, "at most 1"),
        ("rate", math.nan, "at most 1"),
        ("share", 1.01, "at most 1"),
        ("share", math.nan, "at most 1"),
        ("names", [], "a list that is not empty"),
        ("names", "ab", "a list"),
        ("names", ["a", 1], r"text"),
        ("names", ["a", "a"], "a list that names nothing twice"),
        ("names", [""], "text that is not empty"),
        ("mode", "medium", "'fast' or 'slow'"),
        ("flag", 1, "true or false"),
        ("text", 3, "text or a list"),
        ("table", [], "a table"),
    ],
)
def test_what_does_not_belong_there_is_one_line(name: str, given: Any, allowed: str) -> None:
    with pytest.raises(SettingError, match=rf"^Plan\.{name}(\[\d\])? must be {allowed}, not ") as direct:
        Plan(**{name: given})
    with pytest.raises(SettingError, match=rf"^\[plan\]: {name}(\[\d\])? must be {allowed}, not ") as made:
        make(Plan, {name: given}, "[plan]")
    assert direct.value.name == made.value.name == name
    for error in (direct, made):
        assert "\n" not in str(error.value) and len(str(error.value)) < 160


def test_names_that_do_not_exist_or_are_missing() -> None:
    with pytest.raises(SettingError, match=r"^\[plan\] has no key 'cuont': did you mean 'count'\?$") as error:
        make(Plan, {"cuont": 1}, "[plan]", "key")
    assert error.value.name == "cuont"
    with pytest.raises(SettingError, match=r"^task needs 'path'$"):
        make(Needs, {"heads": 3}, "task")
    with pytest.raises(ValueError, match=r"^task: hidden must be a multiple of heads$"):
        make(Needs, {"path": "x", "heads": 3}, "task")


def test_a_command_is_checked_with_what_it_holds() -> None:
    @dataclass
    class Command:
        batch_size: Any
        inner: Any

    check(Command(1, Plan()))
    plan = Plan()
    object.__setattr__(plan, "share", 2.0)  # as a parser fills a class that does not check
    with pytest.raises(SettingError, match=r"^--share must be at most 1, not 2\.0$"):
        check(Command(1, plan))


def test_near() -> None:
    known = ["learning_rate", "anneal", "epochs"]
    assert near("learning-rat", known) == "did you mean 'learning_rate'?"
    assert near("EPOCHS", known) == "did you mean 'epochs'?"
    assert near("zzz", known) == "there are anneal, epochs, learning_rate"
    assert near("zzz", known, "say more") == "say more"
    assert near("zzz", ()) == "there are none"


def test_values_too_large_or_too_deep_to_be_shown() -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    for given in (10**5000, deep):
        with pytest.raises(SettingError, match=r"^Plan\.count must be .*, not this (int|list|tuple)$"):
            Plan(count=given)
