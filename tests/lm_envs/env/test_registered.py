"""Every registered id passes Gymnasium's and Stable-Baselines3's checkers, wrapped as users wrap it; a broken env
fails both."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import lm_envs
from lm_envs.env.single import TextEnv

IDS = sorted(name for name in gymnasium.registry if name.startswith("lm_envs/"))
TEXT = [name for name in IDS if "Cat" not in name]


def test_the_promised_ids_are_there():
    assert {"lm_envs/Reviews-v0", "lm_envs/ReviewsBandit-v0", "lm_envs/Cat-v0"} <= set(IDS)
    assert {"lm_envs/Enumerable-v0", "lm_envs/EnumerableBandit-v0"} <= set(IDS)


def check_both(env):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both recommend things (float actions, other bounds) that do not apply
        check_env(env, skip_render_check=True)
        sb3_check_env(env, skip_render_check=True)


@pytest.mark.parametrize("name", IDS)
def test_both_checkers_pass_with_default_wrappers_and_statistics(name, monkeypatch):
    # The wrapper puts the wall clock into info; on an env of one step the checker compares it between two runs.
    monkeypatch.setattr("gymnasium.wrappers.common.time.perf_counter", lambda: 0.0)
    check_both(gymnasium.make(name))
    check_both(RecordEpisodeStatistics(gymnasium.make(name)))
    check_env(gymnasium.make(name, render_mode="ansi").unwrapped)  # the render check wants the bare env


class OutOfSpace(TextEnv):
    """Broken on purpose: its observations leave its space."""

    def reset(self, **arguments):
        obs, info = super().reset(**arguments)
        return np.full_like(obs, 10**6), info


@pytest.mark.parametrize("check", [check_env, sb3_check_env])
def test_both_checkers_fail_on_a_broken_env(check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(TextEnv("reviews"))
        with pytest.raises(AssertionError):
            check(OutOfSpace("reviews"))


@pytest.mark.parametrize("name", TEXT)
def test_make_vec_is_native_and_one_model_serves_all(name):
    one, many = gymnasium.make(name), gymnasium.make_vec(name, num_envs=64)
    assert many.unwrapped.mdp.reference is one.unwrapped.mdp.reference
    obs, _ = many.reset(seed=0)
    places = {"Reviews": 8 + 24, "Enumerable": 1 + 5}[name.split("/")[1].removesuffix("-v0").removesuffix("Bandit")]
    assert obs.shape == (64, places) and obs in many.observation_space
    many.action_space.seed(0)
    lm_envs.report(many, np.full(64, -5.0))
    obs, rewards, terminated, truncated, infos = many.step(many.action_space.sample())
    assert rewards.dtype == np.float64 and not truncated.any()
    if "Bandit" in name:
        assert terminated.all() and infos["final_info"]["lm"]["score"].shape == (64,)
        assert set(infos["final_info"]["lm"]["finish_reason"]) <= {"stop", "length"}


@pytest.mark.parametrize("name", TEXT)
def test_statistics_wrappers_keep_their_place_in_info(name):
    env = RecordEpisodeStatistics(gymnasium.make(name))
    env.reset(seed=0)
    env.action_space.seed(0)
    total, done = 0.0, False
    while not done:
        lm_envs.report(env, -1.0)
        _, reward, done, _, info = env.step(env.action_space.sample())
        total += reward
    assert info["episode"]["r"] == pytest.approx(total)
    assert set(info["lm"]) == {"score", "kl", "prompt", "prompt_index", "response", "finish_reason", "ref_logprob"}


def test_task_options_reach_the_environment():
    env = gymnasium.make("lm_envs/Reviews-v0", split="test", kl_coef=0.5, min_new_tokens=2)
    assert (
        env.unwrapped.kl_coef == 0.5 and env.reset(seed=0)[1]["action_mask"].sum() == env.unwrapped.mdp.vocab_size - 1
    )
