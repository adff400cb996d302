import math
import random

import pytest

from lm_envs.algos.engine.kl_coefficient import AdaptiveKL


@pytest.mark.parametrize(
    ("kl", "base", "answer"),
    [(6.0, 0.0, 0.0), (6.6, 0.1, 0.2), (600.0, 0.2, 2.0), (-3.0, -0.2, -1.0)],  # the errors are clipped
)
def test_adaptive_coefficient_by_hand(kl, base, answer):
    control = AdaptiveKL(coef=0.1, target=6.0, horizon=4)
    assert control.update(kl) == pytest.approx(0.1 * math.exp(base / 4 + answer))
    assert control.update(6.0) == pytest.approx(0.1 * math.exp(base / 4))  # what is left at the target


@pytest.mark.parametrize("horizon", [1e-3, 0.1, 1.0, 100.0])
def test_it_stays_positive_whatever_the_horizon(horizon):
    """A factor 1 - 0.2 / horizon would be negative; GRPO would then be paid for divergence."""
    assert 0 < AdaptiveKL(coef=0.1, target=6.0, horizon=horizon).update(0.0) < 0.1


def followed(control, iterations=40, speed=0.27, pull=0.29, noise=0.07, seed=0) -> list[float]:
    """KL of a policy that moves at most ``speed`` a step toward the root of KL where ``pull / beta`` lies, as those of
    a run with annealed steps do; it is measured with noise."""
    draws, root, found = random.Random(seed), 0.0, []
    for i in range(iterations):
        found.append(root**2)
        control.update(root**2 * (1 + noise * draws.gauss(0, 1)))
        root = max(0.0, root + speed * (1 - i / iterations) * math.tanh(pull / max(root, 0.05) / control.coef - 1))
    return found


@pytest.mark.parametrize(("start", "iterations"), [(0.1, 40), (0.3, 40), (0.03, 200), (0.1, 200), (0.3, 200)])
def test_it_holds_its_target_after_half_a_run(start, iterations):
    for seed in range(5):
        second = followed(AdaptiveKL(start, 5.0, 3.0), iterations, seed=seed)[iterations // 2 :]
        assert sum(second) / len(second) == pytest.approx(5.0, rel=0.15)


def test_without_the_answer_or_with_a_long_horizon_it_does_not(monkeypatch):
    """Negative controls: Ziegler's rule swings past the target; with a horizon beyond the run nothing is steered."""
    monkeypatch.setattr(AdaptiveKL, "gain", 0.0)
    for horizon in (1.0, 300.0):
        second = followed(AdaptiveKL(0.1, 5.0, horizon))[20:]
        assert max(abs(sum(second[i : i + 5]) / 25 - 1) for i in range(16)) > 0.3


@pytest.mark.parametrize("field", ["target", "horizon", "coef"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_useless_settings_are_refused(field, value):
    with pytest.raises(ValueError, match="AdaptiveKL"):
        AdaptiveKL(**{"coef": 0.1, "target": 1.0, "horizon": 10.0, field: value})
