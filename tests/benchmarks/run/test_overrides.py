"""Settings from command lines and suites: parsed, and checked by name, type and range."""

from __future__ import annotations

import pytest

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.suites import check_overrides, parse_settings


def test_values():
    found = parse_settings(["learning_rate=1e-3", "anneal=False", "micro-batch=none", "baseline=mean", "epochs=3"])
    assert found == {"learning_rate": 1e-3, "anneal": False, "micro_batch": None, "baseline": "mean", "epochs": 3}
    assert type(found["epochs"]) is int


@pytest.mark.parametrize(
    ("items", "message"), [(["epochs"], "name=value"), (["a=1", "a=2"], "twice"), (["=1"], "name=value")]
)
def test_malformed(items, message):
    with pytest.raises(UserError, match=message):
        parse_settings(items)


def test_types_are_put_right_or_refused():
    checked = check_overrides("ppo", {"learning_rate": 1, "episodes": 1e2, "kl_target": None})
    assert checked == {"learning_rate": 1.0, "episodes": 100, "kl_target": None}
    assert [type(value) for value in checked.values()] == [float, int, type(None)]
    for name, value, wanted in (
        ("learning_rate", "fast", "a number, not 'fast'"),
        ("epochs", 1.5, "a whole number, not 1.5"),
        ("anneal", 1, "true or false, not 1"),
        ("epochs", True, "a whole number, not True"),
        ("kl_target", "x", "a number or none, not 'x'"),
    ):
        with pytest.raises(UserError, match=f"^ppo: {name} must be {wanted}$"):
            check_overrides("ppo", {name: value})
    with pytest.raises(UserError, match="must be .*'leave_one_out' or 'value', not 'median'"):
        check_overrides("reinforce", {"baseline": "median"})


def test_unknown_and_out_of_range():
    with pytest.raises(UserError, match="ppo has no setting 'learning_rat': did you mean 'learning_rate'"):
        check_overrides("ppo", {"learning_rat": 1.0})
    with pytest.raises(UserError, match="clip must be above 0, not -1"):
        check_overrides("ppo", {"clip": -1.0})
