"""The suites of models and data on the hub: their form, since no test reaches the hub."""

from __future__ import annotations

import pytest

from lm_envs.benchmarks.run.compare import check_runs
from lm_envs.benchmarks.run.suite_files import BUILT_IN, load_suite
from lm_envs.reward.specs import is_spec, parse_reward
from lm_envs.settings import make
from lm_envs.tasks.custom import CustomConfig

NAMES = sorted(path.stem for path in BUILT_IN.glob("hub-*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_hub_suites_form(name: str):
    suite = load_suite(name)
    assert suite.name == name and suite.description.endswith("(not run here)")
    [task] = suite.tasks
    config = make(CustomConfig, task.options, "custom")
    for text in (config.reward, config.judge):
        assert text is None or (is_spec(text) and parse_reward(text))
    assert config.reward or config.reward_model
    check_runs(suite.runs())


def test_the_four_are_there():
    assert NAMES == ["hub-hh", "hub-imdb", "hub-tldr", "hub-ultrafeedback"]
