"""Cat-v0: transitions and rewards worked out by hand, exact values, slipping, and the two environment checkers."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import lm_envs  # noqa: F401  (registers the ids)
from lm_envs.env.cat import CatEnv, check_map, dynamics, expected_return, value_iteration

UP, RIGHT, DOWN, LEFT = range(4)
ROOM = ["S.B", ".TM"]  # cells 0 1 2 / 3 4 5


def walk(env, *actions):
    """(cell, reward, terminated) of every move after a reset."""
    env.reset(seed=0)
    return [env.step(action)[:3] for action in actions]


def test_moves_and_rewards():
    env = CatEnv(map=ROOM)
    assert env.reset(seed=0) == (0, {})
    # off the grid on all four sides stays; so does off the grid on a broom, which scratches again
    assert walk(env, UP, LEFT, DOWN, DOWN, LEFT) == [
        (0, 0, False),
        (0, 0, False),
        (3, 0, False),
        (3, 0, False),
        (3, 0, False),
    ]
    assert walk(env, RIGHT, RIGHT, RIGHT, UP) == [(1, 0, False), (2, -1, False), (2, -1, False), (2, -1, False)]
    assert walk(env, RIGHT, RIGHT, DOWN)[-1] == (5, 100, True)
    assert walk(env, DOWN, RIGHT)[-1] == (4, -10, True)
    assert walk(env, RIGHT, LEFT) == [(1, 0, False), (0, 0, False)]


def test_a_finished_episode_cannot_go_on():
    env = CatEnv(map=ROOM)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(UP)
    walk(env, DOWN, RIGHT)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(UP)


@pytest.mark.parametrize("action", [4, -1, 1.0, None])
def test_unknown_action(action):
    env = CatEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="up, right, down, left"):
        env.step(action)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (["S.", "."], "row 0 has 2 cells, row 1 has 1"),
        (["S.", ".x"], "row 1, column 1 holds 'x'"),
        (["..", ".M"], "no start"),
        ([], "non-empty"),
        (["S", ""], "non-empty"),
        ("S.M", r"one string: use \['S.M'\]"),
    ],
)
def test_bad_maps_are_named(rows, complaint):
    with pytest.raises(ValueError, match=complaint):
        CatEnv(map=rows)


def test_the_tolerance_bounds_the_error():
    exact, _ = value_iteration(gamma=0.99, slip=0.2, tolerance=1e-9)
    for tolerance in (1.0, 0.1, 1e-3):
        found, _ = value_iteration(gamma=0.99, slip=0.2, tolerance=tolerance)
        assert np.abs(found - exact).max() <= tolerance


def test_other_bad_arguments():
    for slip in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="probability"):
            CatEnv(slip=slip)
    with pytest.raises(ValueError, match="render_mode"):
        CatEnv(render_mode="human")
    for gamma in (1.0, -0.5):
        with pytest.raises(ValueError, match="gamma"):
            value_iteration(gamma=gamma)
    with pytest.raises(ValueError, match="gamma"):
        expected_return([0] * 25, gamma=1.0, limit=None)
    with pytest.raises(ValueError, match=r"\(25,\).*\(24,\)"):
        expected_return([0] * 24)
    with pytest.raises(ValueError, match="sum to 1"):
        expected_return(np.full((25, 4), 0.3))
    with pytest.raises(ValueError, match="actions 0 to 3"):
        expected_return([4] * 25)
    with pytest.raises(ValueError, match="CatEnv"):
        value_iteration(gymnasium.make("CartPole-v1"))


def test_values_of_a_corridor_by_hand():
    """S.M: 100 after the second move, so V = 95 and 100, and nothing at the meat."""
    values, policy = value_iteration(["S.M"])
    np.testing.assert_allclose(values, [95.0, 100.0, 0.0], atol=1e-9)
    assert policy[:2].tolist() == [RIGHT, RIGHT]
    # Always up stays for ever; left and right with equal chance solves V0 = g/2 (V0 + V1), V1 = g/2 V0 + 50.
    assert expected_return([UP] * 3, ["S.M"]) == 0.0
    half = np.tile([0, 0.5, 0, 0.5], (3, 1))
    a = 0.95 / 2
    assert expected_return(half, ["S.M"], limit=None) == pytest.approx(a * 50 / (1 - a - a**2))


def test_a_slippery_corridor_by_hand():
    """One step right of S is meat, up and down stay: V = 0.8*100 + 0.2*g*V. With the broom, -1 a slip."""
    values, _ = value_iteration(["SM"], slip=0.2)
    assert values[0] == pytest.approx(80 / (1 - 0.2 * 0.95))
    _, reward = dynamics(["S.", "BT"], slip=0.5)
    # from S to the right: half arrives at the empty cell, a quarter stays at the top, a quarter slips onto the broom
    assert reward[0, RIGHT] == -0.25
    assert reward[1, DOWN] == -5.0
    assert not reward[3].any()
    continuing, _ = dynamics(["S.", "BT"], slip=0.5)
    # down from the empty cell: half goes on at S (slipped left) or stays (slipped right), half ends in the bathtub
    np.testing.assert_allclose(continuing[1, DOWN], [0.25, 0.25, 0.0, 0.0])


def test_a_broom_is_worth_a_short_cut_and_a_bathtub_is_not():
    # through the broom 2 moves, around it 4: 0.95*100 - 1 > 0.95^3*100
    values, policy = value_iteration(["SBM", "..."])
    assert (policy[0], values[0]) == (RIGHT, pytest.approx(94.0))
    values, policy = value_iteration(["STM", "..."])
    assert (policy[0], values[0]) == (DOWN, pytest.approx(100 * 0.95**3))


def test_on_the_default_map_slipping_changes_the_best_way():
    clean, policy = value_iteration()
    assert clean[0] == pytest.approx(100 * 0.95**7)  # eight moves, no broom
    slippery, careful = value_iteration(slip=0.2)
    assert slippery[0] < clean[0]
    assert expected_return(careful, slip=0.2) > expected_return(policy, slip=0.2) + 1.0
    assert expected_return(policy) == pytest.approx(clean[0])


@pytest.mark.parametrize("slip", [0.0, 0.2, 1.0])
def test_no_policy_beats_value_iteration(slip):
    values, policy = value_iteration(slip=slip)
    best = expected_return(policy, slip=slip, limit=None)
    assert best == pytest.approx(values[0])
    generator = np.random.default_rng(0)
    for _ in range(50):
        other = np.where(generator.random(25) < 0.8, policy, generator.integers(4, size=25))
        assert expected_return(other, slip=slip, limit=None) <= best + 1e-9


def test_expected_return_is_what_episodes_return():
    """Monte Carlo through gymnasium.make, limit and slip included, within four standard errors."""
    env = gymnasium.make("lm_envs/Cat-v0", slip=0.3, map=["S..", "BT.", ".SM"])
    probability = np.random.default_rng(3).dirichlet(np.ones(4), size=9)
    generator = np.random.default_rng(5)
    cumulative = probability.cumsum(axis=1)
    returns = []
    for episode in range(3000):
        obs, _ = env.reset(seed=0 if episode == 0 else None)
        total, discount, over = 0.0, 1.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step((generator.random() > cumulative[obs, :3]).sum())
            total, discount, over = total + discount * reward, discount * 0.95, terminated or truncated
        returns.append(total)
    error = np.std(returns) / np.sqrt(len(returns))
    assert abs(np.mean(returns) - expected_return(probability, env)) < 4 * error
    # negative control: with the wrong slip it is off
    assert abs(np.mean(returns) - expected_return(probability, env, slip=0.0)) > 4 * error


def test_the_limit_counts():
    """Two moves to the meat: within a limit of one nothing is earned."""
    assert expected_return([RIGHT] * 3, ["S.M"], limit=1) == 0.0
    assert expected_return([RIGHT] * 3, ["S.M"], limit=2) == 95.0


@pytest.mark.parametrize("slip", [0.0, 0.2, 0.7])
def test_slip_frequencies(slip):
    """From the middle of an open room: straight on 1 - slip, each side slip/2, never backwards."""
    env = CatEnv(map=["...", ".S.", "..."], slip=slip)
    env.reset(seed=1)
    ends = np.zeros(9)
    moves = 4000
    for _ in range(moves):
        env.reset()
        ends[env.step(UP)[0]] += 1
    expected = np.zeros(9)
    expected[[1, 3, 5]] = 1 - slip, slip / 2, slip / 2
    error = np.sqrt(expected * (1 - expected) / moves)
    assert (np.abs(ends / moves - expected) <= 4 * error + 1e-12).all()


def test_starts_are_uniform_and_seeded():
    env = CatEnv(map=["SM", "SS"])
    first = [env.reset(seed=7)[0]] + [env.reset()[0] for _ in range(599)]
    again = [env.reset(seed=7)[0]] + [env.reset()[0] for _ in range(599)]
    assert first == again
    counts = np.bincount(first, minlength=4)
    assert counts[1] == 0 and (np.abs(counts[[0, 2, 3]] - 200) < 4 * np.sqrt(600 * 2 / 9)).all()


def test_registered_with_a_limit_of_100_steps():
    env = gymnasium.make("lm_envs/Cat-v0")
    env.reset(seed=0)
    for step in range(100):
        _, reward, terminated, truncated, _ = env.step(UP)
        assert (reward, terminated, truncated) == (0.0, False, step == 99)
    assert env.unwrapped.gamma == 0.95
    assert value_iteration(env)[0].tolist() == value_iteration()[0].tolist()


def test_render():
    env = CatEnv(map=ROOM, render_mode="ansi")
    env.reset(seed=0)
    assert env.render() == "C . B\n. T M\n"
    env.step(DOWN)
    env.step(RIGHT)
    assert env.render() == "S . B\n. C M\n"


@pytest.mark.parametrize("slip", [0.0, 0.2])
@pytest.mark.parametrize("wrap", [lambda env: env, RecordEpisodeStatistics])
@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")
def test_both_checkers_pass(slip, wrap):
    env = wrap(gymnasium.make("lm_envs/Cat-v0", slip=slip, render_mode="ansi"))
    check_env(env)
    check_env(env.unwrapped)
    sb3_check_env(env)


class OutOfSpace(CatEnv):
    """Broken on purpose: cells count from 1, so the last one lies outside the space, and the map is one cell."""

    def reset(self, **arguments):
        cell, info = super().reset(**arguments)
        return cell + 25, info

    def step(self, action):
        cell, *rest = super().step(action)
        return cell + 25, *rest


@pytest.mark.parametrize("checker", [check_env, sb3_check_env])
def test_both_checkers_fail_on_a_broken_env(checker):
    with pytest.raises(AssertionError):
        checker(OutOfSpace())


def test_check_map_gives_rows():
    assert check_map(["S.", ".M"]) == ("S.", ".M")
