"""Stable-Baselines3's VecEnv made of ours: its contract, and what it refuses."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

import lm_envs
from lm_envs.algos.other_libraries.sb3 import CausalLMActorCriticPolicy, TextVecEnv
from lm_envs.env.single import TextBanditEnv, TextEnv
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from tests import tiny
from tests.algos.other_libraries.sb3_pieces import env


def test_the_librarys_checker_passes_on_the_single_env():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends bounds that do not apply
        check_env(TextEnv(tiny.task(), kl_coef=0.0), skip_render_check=True)
        check_env(TextBanditEnv(tiny.task(), kl_coef=0.0), skip_render_check=True)


def test_one_row_is_what_the_library_makes_of_the_single_env():
    ours = TextVecEnv(TextVectorEnv(tiny.task(), 1, min_new_tokens=1))
    theirs = DummyVecEnv([lambda: TextEnv(tiny.task(), min_new_tokens=1)])
    generator = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody reports here
        for venv in (ours, theirs):
            venv.seed(5)
        np.testing.assert_array_equal(ours.reset(), theirs.reset())
        ends = 0
        for _ in range(40):
            np.testing.assert_array_equal(ours.reset_infos[0]["action_mask"], theirs.reset_infos[0]["action_mask"])
            actions = generator.integers(0 if ours.env_method("action_masks")[0][tiny.EOS] else 1, 4, 1)
            (obs, rewards, dones, infos), (obs_, rewards_, dones_, infos_) = ours.step(actions), theirs.step(actions)
            np.testing.assert_array_equal(obs, obs_)
            np.testing.assert_allclose(rewards, rewards_, rtol=1e-6)
            assert rewards.dtype == rewards_.dtype and dones.tolist() == dones_.tolist()
            assert infos[0]["TimeLimit.truncated"] is False if dones[0] else "TimeLimit.truncated" not in infos[0]
            if dones[0]:
                ends += 1
                np.testing.assert_array_equal(infos[0]["terminal_observation"], infos_[0]["terminal_observation"])
                assert infos[0]["lm"]["response"] == infos_[0]["lm"]["response"]
                assert infos[0]["lm"]["score"] == infos_[0]["lm"]["score"] and "_score" not in infos[0]["lm"]
            else:
                np.testing.assert_array_equal(infos[0]["action_mask"], infos_[0]["action_mask"])
    assert ends > 5


def test_infos_go_to_the_rows_that_ended():
    venv = VecMonitor(env(3, kl_coef=0.0))
    obs = venv.reset()
    _, rewards, dones, infos = venv.step(np.array([2, tiny.EOS, 3]))
    assert dones.tolist() == [False, True, False] and rewards.dtype == np.float32
    assert infos[0] == {} and infos[2] == {}
    assert infos[1]["lm"]["finish_reason"] == "stop" and infos[1]["episode"]["l"] == 1
    expected = obs[1].copy()
    expected[venv.get_attr("mdp")[0].prompt_length] = tiny.EOS
    np.testing.assert_array_equal(infos[1]["terminal_observation"], expected)


class CutAfterTwo(TextVectorEnv):
    """A time limit that is not part of the task."""

    def step(self, actions):
        limit = self._lengths == 1
        obs, rewards, terminated, truncated, infos = super().step(np.where(limit, tiny.EOS, actions))
        return obs, rewards, terminated & ~limit, truncated | (terminated & limit), infos


def test_truncation_is_told_and_bootstraps():
    venv = TextVecEnv(CutAfterTwo(tiny.task(), 2, kl_coef=0.0))
    model = PPO(CausalLMActorCriticPolicy, venv, n_steps=2, batch_size=4, gamma=1.0, seed=0, learning_rate=0.0)
    with torch.no_grad():
        model.policy.lm.value_head.bias.fill_(100.0)
    venv.reset()
    assert all("TimeLimit.truncated" not in info for info in venv.step(np.array([2, 2]))[3])
    assert [info["TimeLimit.truncated"] for info in venv.step(np.array([2, 2]))[3]] == [True, True]
    model.learn(4)
    rewards = model.rollout_buffer.rewards.reshape(-1)
    ended = np.abs(rewards) > 50
    assert ended.any()  # the value of the terminal observation was added
    with torch.no_grad():
        model.policy.lm.value_head.bias.fill_(0.0)
    model.learn(4)
    assert (np.abs(model.rollout_buffer.rewards) < 10).all()


def test_attributes_and_methods():
    venv = VecMonitor(env(4, render_mode="ansi"))
    assert venv.get_attr("is_bandit") == [False] * 4 and len(venv.get_attr("task", [0, 2])) == 2
    assert not venv.has_attr("no_such_thing") and venv.has_attr("action_masks")
    venv.set_attr("kl_coef", 0.5)
    assert venv.get_attr("kl_coef") == [0.5] * 4
    venv.env_method("set_kl_coef", 0.25)
    lm_envs.set_kl_coef(venv, venv.get_attr("kl_coef")[0] * 2)
    assert venv.get_attr("kl_coef", 1) == [0.5]
    for call in (lambda: venv.set_attr("kl_coef", 0.1, 2), lambda: venv.env_method("set_kl_coef", 0.1, indices=[1])):
        with pytest.raises(ValueError, match="share one environment"):
            call()
    venv.seed(7)
    first = venv.reset()
    assert len(venv.env_method("render")) == 4 and len(venv.env_method("render", indices=[0])) == 1
    assert not (venv.reset() == first).all()  # the seed is for one reset; then the next episodes come
    venv.seed(7)
    np.testing.assert_array_equal(venv.reset(), first)
    venv.set_options({"first_episode": 4})
    later = venv.reset()
    venv.set_options({"first_episode": 0})
    np.testing.assert_array_equal(venv.reset(), first)
    assert not (later == first).all()
    venv.set_options([{"first_episode": 1}, {}, {}, {}])
    with pytest.raises(ValueError, match="one dict for all"):
        venv.reset()


def test_wrappers_inside_are_seen():
    wrapper = gymnasium.wrappers.vector.RecordEpisodeStatistics
    venv = TextVecEnv(wrapper(TextVectorEnv(tiny.task(), 2)))
    assert venv.env_is_wrapped(wrapper) == [True, True] and venv.env_is_wrapped(gymnasium.Wrapper, 0) == [False]
    venv.close()


def test_what_is_refused():
    with pytest.raises(TypeError, match="text vector environment"):
        TextVecEnv(TextEnv(tiny.task()))
    with pytest.raises(ValueError, match="SameStep"):
        TextVecEnv(TextVectorEnv(tiny.task(), 2, autoreset_mode="NextStep"))
    with pytest.raises(TypeError, match="observation space of a TextVecEnv"):
        PPO(CausalLMActorCriticPolicy, TextEnv(tiny.task()))
    with pytest.raises(ValueError, match="bandit"):
        PPO(CausalLMActorCriticPolicy, TextVecEnv(TextBanditVectorEnv(tiny.task(), 2)))
    with pytest.raises(ValueError, match="MaskablePPO"):
        PPO(CausalLMActorCriticPolicy, env(reference_top_k=3))
