"""The rules that choose settings by a model's size: who they are for, what is given comes first, and the warning."""

from __future__ import annotations

import pytest

from lm_envs.algos.engine import settings_by_size as rules
from lm_envs.algos.registry import ALGORITHMS, WRAPPERS, make_config

B = 10**9


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in WRAPPERS])
def test_small_models_keep_the_algorithms_own_defaults(name):
    config = make_config(name)
    assert rules.settings(name, config, 5_000_000, lora=False) == {}
    assert rules.adaptation(5_000_000, {}, True) == {}
    assert rules.far_off(name, 1e-3, 5_000_000, False) is None
    # and for a large one, what is chosen is a config
    chosen = rules.settings(name, config, 135_000_000, lora=True)
    made = make_config(name, **chosen)
    assert made.learning_rate == chosen["learning_rate"] < 1e-3 and made.micro_batch == 16
    assert made.episodes is None or made.episodes <= 64 + made.group_size


def test_rates_fall_with_size_and_adapters_take_ten_times_more():
    for name in ("ppo", "expert-iteration"):
        rates = [rules.learning_rate(name, int(size), False) for size in (1e8, 2 * B, 7 * B, 70 * B)]
        assert rates == sorted(rates, reverse=True) and rates[0] <= 5e-5 and rates[-1] >= 1e-6
    assert rules.learning_rate("ppo", 7 * B, False) == 3e-6  # N+ details
    for name in ("ppo", "dpo", "sft", "quark"):
        whole, lora = (rules.learning_rate(name, 135_000_000, each) for each in (False, True))
        assert lora == pytest.approx(10 * whole)
    assert rules.learning_rate("dpo", 135_000_000, False) == 1e-6


def test_what_is_given_comes_first():
    config = make_config("ppo", learning_rate=1e-4)
    given = {"learning_rate": 1e-4, "kl_coef": 0.1}
    assert rules.settings("ppo", config, B, False, given) == {"micro_batch": 4, "episodes": 64}
    assert rules.settings("ppo", config, B, False)["kl_target"] == 6.0
    assert "kl_target" not in rules.settings("expert-iteration", make_config("expert-iteration"), B, False)
    odd = make_config("rloo", group_size=6, episodes=126)
    assert rules.settings("rloo", odd, B, False)["episodes"] == 66  # whole groups
    few = make_config("rloo", episodes=32)
    assert "episodes" not in rules.settings("rloo", few, B, False)
    assert rules.adaptation(135_000_000, {}, True) == {"lora_rank": 16}
    assert rules.adaptation(135_000_000, {"lora_rank": 0}, True) == {}
    assert rules.adaptation(135_000_000, {}, False) == {}


def test_a_rate_that_is_ten_times_off_is_told_with_the_number():
    assert rules.far_off("ppo", 1e-4, 135_000_000, True) is None
    high = rules.far_off("ppo", 3e-3, 135_000_000, True)
    assert high and "10 times" in high and "learning_rate=0.0003" in high and "135 M" in high and "collapse" in high
    low = rules.far_off("ppo", 1e-6, 135_000_000, True)
    assert low and "1/300 of" in low and "may not move" in low
