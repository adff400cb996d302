import pytest

from lm_envs.algos.engine.kl_coefficient import AdaptiveKL


def test_adaptive_coefficient_by_hand():
    control = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    assert control.update(6.0, 100) == pytest.approx(0.1)
    assert control.update(6.6, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    control = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    assert control.update(600.0, 100) == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # the error is clipped
    control = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    assert control.update(-3.0, 100) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


@pytest.mark.parametrize("episodes", [999, 1000, 1001, 5000, 10_000, 10**6])
def test_it_stays_positive_whatever_the_batch(episodes):
    """1 - 0.2 n / horizon is 0 at 5,000 episodes and negative beyond; GRPO would then be paid for divergence."""
    control = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    found = control.update(0.0, episodes)
    assert 0 < found < 0.1
    assert found == pytest.approx(0.1 * (0.8 ** (episodes / 1000) if episodes > 1000 else 1 - 0.2 * episodes / 1000))


def test_it_steers_a_responding_system_to_its_target():
    """A policy whose KL is 1/coef: the target 4 is reached at coef 0.25, from either side."""
    for start in (0.05, 2.0):
        control = AdaptiveKL(coef=start, target=4.0, horizon=1000)
        for _ in range(400):
            control.update(1 / control.coef, 128)
        assert 1 / control.coef == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("field", ["target", "horizon", "coef"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_useless_settings_are_refused(field, value):
    with pytest.raises(ValueError, match="AdaptiveKL"):
        AdaptiveKL(**{"coef": 0.1, "target": 1.0, "horizon": 10.0, field: value})
