"""Stable-Baselines3 and sb3-contrib unmodified: the VecEnv's contract, cached and teacher-forced steps, the exact
penalty, masks, saving, and that they learn."""

import copy
import importlib.util
import re
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecMonitor

import lm_envs
from lm_envs.algos.policies import LMPolicy
from lm_envs.algos.prefix_chains import prefix_chains
from lm_envs.algos.sb3 import CausalLMActorCriticPolicy, TextVecEnv, ToldActions
from lm_envs.rollout import collect, rollout
from lm_envs.text_env import TextBanditEnv, TextEnv
from lm_envs.vector_env import TextBanditVectorEnv, TextVectorEnv
from tests import tiny

WHOLE = dict(n_steps=12, batch_size=96, gamma=1.0, gae_lambda=0.95, device="cpu")  # of 8 rows


def env(rows=8, **options):
    return TextVecEnv(TextVectorEnv(other_start(), rows, **options))


def other_start(**changes):
    """A policy that starts away from the reference, so that there is a KL to be charged."""
    return tiny.task(policy=tiny.gpt2(seed=1), **changes)


def policy(venv, cls=CausalLMActorCriticPolicy, value_seed=3):
    made = cls(venv.observation_space, venv.action_space, lambda _: 1e-3)
    with torch.no_grad():  # a critic at zero would hide mistakes
        made.lm.value_head.weight.normal_(generator=torch.Generator().manual_seed(value_seed))
    return made


# The environments


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
    assert venv.get_attr("face") == ["mdp"] * 4 and len(venv.get_attr("task", [0, 2])) == 2
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
    with pytest.raises(ValueError, match="MDP face"):
        PPO(CausalLMActorCriticPolicy, TextVecEnv(TextBanditVectorEnv(tiny.task(), 2)))
    with pytest.raises(ValueError, match="MaskablePPO"):
        PPO(CausalLMActorCriticPolicy, env(reference_top_k=3))


# Prefixes


def test_prefix_chains_by_hand():
    obs = np.array([[-1, 5, 7, -1], [-1, 5, -1, -1], [3, 5, -1, -1], [-1, 5, -1, -1], [-1, 5, -1, -1]])
    chains = prefix_chains(obs, np.array([0, 7, 7, 0, 7]), 2)
    assert chains.texts.tolist() == [[-1, 5, 0, -1], [-1, 5, 7, 0], [3, 5, 7, -1]]
    assert chains.row.tolist() == [1, 1, 2, 0, 1] and chains.position.tolist() == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="step 1 acts after its response is full"):
        prefix_chains(np.array([[1, 2, -1], [1, 2, 3]]), np.array([0, 0]), 1)


@pytest.mark.parametrize("vocabulary", [3, 300])  # 300 takes two bytes
def test_prefix_chains_hold_every_step_in_as_few_texts_as_there_can_be(vocabulary):
    generator = np.random.default_rng(vocabulary)
    obs = np.full((200, 7), -1)
    obs[:, 1] = generator.integers(0, 2, 200)
    lengths = generator.integers(0, 5, 200)
    for row, length in enumerate(lengths):
        obs[row, 2 : 2 + length] = generator.choice([0, 1, vocabulary - 1], length)
    actions = generator.choice([0, 1, vocabulary - 1], 200)
    texts, row, position = prefix_chains(obs, actions, 2)
    assert position.tolist() == lengths.tolist()
    wanted = {(*o[: 2 + n], a) for o, n, a in zip(obs.tolist(), lengths, actions.tolist(), strict=True)}
    for step in range(200):
        assert texts[row[step], : 3 + lengths[step]].tolist() == [*obs[step, : 2 + lengths[step]], actions[step]]
    leaves = {text for text in wanted if not any(o != text and o[: len(text)] == text for o in wanted)}
    assert {tuple(t for i, t in enumerate(text) if i < 2 or t >= 0) for text in texts.tolist()} == leaves
    assert len(texts) == len(leaves)


# The policy


def steps_of(traj, prompt_length):
    """A trajectory as the library stores it: an observation per step."""
    text = torch.cat([traj.prompt, traj.response], dim=1)
    rows, places = traj.mask.nonzero(as_tuple=True)
    obs = text[rows].clone()
    obs[torch.arange(text.shape[1]) >= prompt_length + places[:, None]] = -1
    return obs, traj.actions[rows, places], rows, places


def test_evaluate_actions_is_our_policys_evaluation_gradients_too():
    venv = env(min_new_tokens=2, temperature=0.7)
    actor = policy(venv)
    traj = collect(venv.text_env, actor.lm, episodes=24, seed=2)
    obs, actions, rows, places = steps_of(traj, actor.lm.prompt_length)
    order = torch.randperm(len(obs), generator=torch.Generator().manual_seed(0))

    def gradients(loss):
        actor.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in actor.parameters()]

    values, logprob, entropy = actor.evaluate_actions(obs[order], actions[order])
    whole = actor.lm.evaluate(traj)
    for found, expected in ((values.squeeze(1), whole.value), (logprob, whole.logprob), (entropy, whole.entropy)):
        assert found.std() > 0
        torch.testing.assert_close(found, expected[rows, places][order], rtol=0, atol=1e-10)
    ours = gradients((logprob + 0.3 * entropy + 0.7 * values.squeeze(1) ** 2).mean())
    whole = actor.lm.evaluate(traj)
    per_step = whole.logprob + 0.3 * whole.entropy + 0.7 * whole.value[:, :-1] ** 2
    theirs = gradients(per_step[traj.mask].mean())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_whole_buffer_costs_a_text_per_episode_and_no_head_beyond_its_steps():
    venv = env()
    actor = policy(venv)
    traj = collect(venv.text_env, actor.lm, episodes=16, seed=2)
    obs, actions, _, _ = steps_of(traj, actor.lm.prompt_length)
    read, heads = [], []
    model = actor.lm.model
    with (
        model.register_forward_pre_hook(lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True),
        model.lm_head.register_forward_hook(lambda _, given, out: heads.append(out.shape[:-1].numel())),
    ):
        actor.evaluate_actions(obs, actions)
    assert len(read) == 1 and read[0] <= 16 < len(obs) and heads == [len(obs)]


def test_cached_steps_are_teacher_forced_ones_whatever_happens_to_rows():
    venv = env(6)
    actor = policy(venv)
    generator = np.random.default_rng(0)
    obs, previous = venv.reset(), None
    for step in range(30):
        if step % 7 == 3:
            obs = obs[generator.permutation(6)]  # rows swapped under the cache
        if step % 7 == 5:
            obs = obs.copy()
            obs[2] = previous[4]  # one taken back
        if step == 20:
            with torch.no_grad():  # an update under the cache
                actor.lm.model.transformer.wte.weight.mul_(1.1)
        rows = torch.as_tensor(obs)
        with torch.no_grad():
            actions, values, logprob = actor.forward(rows)
            torch.testing.assert_close(actor.predict_values(rows), values)
        values_, logprob_, _ = actor.evaluate_actions(rows, torch.as_tensor(actions))
        torch.testing.assert_close(logprob, logprob_.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(values, values_.detach(), rtol=0, atol=1e-10)
        previous = obs
        obs = venv.step(actions.cpu().numpy())[0] if step % 7 not in (3, 5) else venv.reset()


def test_sampling_follows_the_distribution_and_greedy_is_its_mode():
    venv = env(1, min_new_tokens=1, temperature=0.7)
    actor = policy(venv)
    torch.manual_seed(0)
    rows = torch.as_tensor(venv.reset()).repeat(5_000, 1)
    actions, _, logprob = actor.forward(rows)
    with torch.no_grad():
        p = actor.get_distribution(rows[:1]).distribution.probs[0]
    assert p[tiny.EOS] == 0 and p.sum() == pytest.approx(1)
    frequency = torch.bincount(torch.as_tensor(actions), minlength=10) / 5_000
    assert (frequency - p).abs().max() < 4 * 0.5 / 5_000**0.5
    torch.testing.assert_close(p[actions].log(), logprob)
    greedy, _, of_greedy = actor.forward(rows[:1], deterministic=True)
    assert int(greedy) == int(p.argmax())
    torch.testing.assert_close(of_greedy.exp(), p.max()[None])


def test_the_seed_of_the_library_decides():
    def tokens(seed):
        model = PPO(CausalLMActorCriticPolicy, env(), seed=seed, learning_rate=0.0, n_epochs=1, **WHOLE)
        return model.learn(96).rollout_buffer.actions.copy()

    assert (tokens(1) == tokens(1)).all() and (tokens(1) != tokens(2)).any()


class Recorder(BaseCallback):
    """The rewards that the environment paid, with what they were paid for."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def _on_step(self):
        names = ("obs_tensor", "actions", "rewards", "dones", "infos", "log_probs")
        self.steps.append(copy.deepcopy([self.locals[name] for name in names]))
        return True


@torch.no_grad()
def reference_logprob(reference, obs, action):
    text = torch.as_tensor(obs[obs >= 0])
    return float(torch.log_softmax(reference(input_ids=text[None]).logits[0, -1], dim=-1)[action])


def missed_penalty(venv):
    """Largest difference of a reward from score - beta (log pi - log ref), everything computed from scratch."""
    model, recorder = PPO(CausalLMActorCriticPolicy, venv, seed=0, learning_rate=0.0, n_epochs=1, **WHOLE), Recorder()
    model.learn(96, callback=recorder)
    mdp, worst, total = venv.get_attr("mdp")[0], 0.0, 0.0
    for observed, actions, rewards, dones, infos, _ in recorder.steps:
        for row, action in enumerate(actions):
            obs = observed[row].numpy()
            ref = reference_logprob(mdp.reference, obs, action)
            mine = reference_logprob(model.policy.lm.model, obs, action)
            score = infos[row]["lm"]["score"] if dones[row] else 0.0
            worst = max(worst, abs(rewards[row] - (score - 0.5 * (mine - ref))))
            total += abs(mine - ref)
    assert total > 1
    return worst


class Forgetful(VecEnvWrapper):
    """Loses what the actions bring."""

    def reset(self):
        return self.venv.reset()

    def step_async(self, actions):
        self.venv.step_async(np.array(actions))

    def step_wait(self):
        return self.venv.step_wait()


def test_the_exact_penalty_is_charged_and_without_the_report_it_is_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert missed_penalty(VecMonitor(env(kl_coef=0.5))) < 1e-5
    with pytest.warns(UserWarning, match="did not report"):
        assert missed_penalty(Forgetful(env(kl_coef=0.5))) > 0.1


def test_told_actions_bring_only_their_own():
    actions = np.arange(3).view(ToldActions)
    actions.logprob = np.array([-1.0, -2.0, -3.0])
    assert actions.reshape(-1, 1).logprob is actions.logprob
    for other in (actions[::-1], actions + 1, actions.copy(), np.array(actions)):
        assert getattr(other, "logprob", None) is None


def test_the_librarys_evaluation_reports_too():
    venv = VecMonitor(env(kl_coef=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_policy(PPO(CausalLMActorCriticPolicy, venv, **WHOLE), venv, n_eval_episodes=4)


def test_the_ratio_is_one_before_the_first_update():
    model = PPO(CausalLMActorCriticPolicy, env(), seed=0, learning_rate=0.0, n_epochs=1, **WHOLE)
    model.learn(2 * 96)  # the second buffer begins in the middle of texts
    for batch in model.rollout_buffer.get(40):
        values, logprob, _ = model.policy.evaluate_actions(batch.observations, batch.actions.long().flatten())
        assert (logprob - batch.old_log_prob).exp().sub(1).abs().max() < 1e-5
        assert (values.flatten() - batch.old_values).abs().max() < 1e-5


def test_saved_and_loaded_it_goes_on(tmp_path):
    venv = VecMonitor(env())
    model = PPO(CausalLMActorCriticPolicy, venv, seed=0, **WHOLE).learn(96)
    model.save(tmp_path / "model.zip")
    obs = venv.reset()
    greedy, _ = model.predict(obs, deterministic=True)
    alone = PPO.load(tmp_path / "model.zip")  # no environment, and so no model to start from
    np.testing.assert_array_equal(alone.predict(obs, deterministic=True)[0], greedy)
    assert alone.predict(obs[0], deterministic=True)[0] == greedy[0]
    again = PPO.load(tmp_path / "model.zip", env=venv)
    for a, b in zip(model.policy.state_dict().values(), again.policy.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it reports as before
        again.learn(96)
    model.policy.save(tmp_path / "policy.pt")
    loaded = CausalLMActorCriticPolicy.load(tmp_path / "policy.pt")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], greedy)


# Learning


def mean_return(model):
    return np.mean([episode["r"] for episode in model.ep_info_buffer])


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [(PPO, WHOLE | dict(n_epochs=4)), (A2C, dict(n_steps=12, gamma=1.0, use_rms_prop=False, device="cpu"))],
)
def test_they_learn_on_a_tiny_task_and_the_reference_stays(algorithm, settings):
    venv = VecMonitor(TextVecEnv(TextVectorEnv(tiny.task(), 8)))
    reference = venv.get_attr("mdp")[0].reference
    before = [p.clone() for p in reference.parameters()]
    still = algorithm(CausalLMActorCriticPolicy, venv, learning_rate=0.0, seed=0, **settings)
    model = algorithm(CausalLMActorCriticPolicy, venv, learning_rate=1e-2, seed=0, stats_window_size=40, **settings)
    assert mean_return(model.learn(8 * 96)) > mean_return(still.learn(3 * 96)) + 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))


def example():
    file = Path(__file__).resolve().parents[2] / "examples" / "sb3_reviews.py"
    spec = importlib.util.spec_from_file_location("example_sb3", file)
    sys.modules["example_sb3"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Masks

contrib = pytest.importorskip("sb3_contrib")
from lm_envs.algos.sb3_masked import MaskableCausalLMActorCriticPolicy  # noqa: E402


def top_k_of_the_reference(mdp, obs, k):
    text = torch.as_tensor(obs[obs >= 0])
    logits = mdp.reference(input_ids=text[None]).logits[0, -1]
    if (obs[mdp.prompt_length :] >= 0).sum() < mdp.min_new_tokens:
        logits[tiny.EOS] = -torch.inf
    allowed = torch.zeros(len(logits), dtype=torch.bool)
    allowed[logits.topk(k).indices] = True
    return allowed, logits.masked_fill(~allowed, -torch.inf)


def test_the_mask_is_the_references_top_k_in_action_report_and_penalty():
    venv = VecMonitor(env(reference_top_k=3, min_new_tokens=1, kl_coef=0.5))
    model = contrib.MaskablePPO(MaskableCausalLMActorCriticPolicy, venv, seed=0, learning_rate=0.0, n_epochs=1, **WHOLE)
    recorder = Recorder()
    model.learn(96, callback=recorder)
    mdp, ends = venv.get_attr("mdp")[0], 0
    for observed, actions, rewards, dones, infos, log_probs in recorder.steps:
        for row, action in enumerate(actions):
            obs = observed[row].numpy()
            allowed, ref_logits = top_k_of_the_reference(mdp, obs, 3)
            assert allowed[action] and allowed.sum() == 3
            text = torch.as_tensor(obs[obs >= 0])
            with torch.no_grad():
                mine = model.policy.lm.model(input_ids=text[None]).logits[0, -1].masked_fill(~allowed, -torch.inf)
            mine, ref = (torch.log_softmax(x, -1)[action] for x in (mine, ref_logits))
            assert float(log_probs[row]) == pytest.approx(float(mine), abs=1e-9)
            score = infos[row]["lm"]["score"] if dones[row] else 0.0
            assert rewards[row] == pytest.approx(score - 0.5 * float(mine - ref), abs=1e-5)
            if dones[row]:
                ends += 1
                final = torch.as_tensor(infos[row]["terminal_observation"])[None]
                bulk = mdp.reference_logprob(*final.split([mdp.prompt_length, mdp.max_new_tokens], 1))
                np.testing.assert_allclose(infos[row]["lm"]["ref_logprob"], bulk[0], atol=1e-9)
    assert ends > 5
    for batch in model.rollout_buffer.get(96):
        assert (batch.action_masks.sum(1) == 3).all()
        actions = batch.actions.long().flatten()
        _, logprob, entropy = model.policy.evaluate_actions(batch.observations, actions, batch.action_masks)
        assert (logprob - batch.old_log_prob).abs().max() < 1e-5 and entropy.max() < np.log(3) + 1e-9
        _, unmasked, _ = model.policy.evaluate_actions(batch.observations, actions)
        assert (unmasked - batch.old_log_prob).abs().max() > 0.1  # the mask is what makes them equal
        distribution = model.policy.get_distribution(batch.observations[:5], batch.action_masks[:5])
        torch.testing.assert_close(distribution.log_prob(actions[:5]), logprob[:5])


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_the_mask_belongs_to_the_state_in_every_autoreset_mode(mode):
    text = TextVectorEnv(tiny.task(), 3, reference_top_k=2, kl_coef=0.0, autoreset_mode=mode)
    obs, info = text.reset(seed=0)
    for _ in range(20):
        mask = info["action_mask"]
        np.testing.assert_array_equal(mask, text.action_masks())
        for row in (~text._done).nonzero()[0]:
            assert mask[row].tolist() == top_k_of_the_reference(text.mdp, obs[row], 2)[0].int().tolist()
        obs, _, done, _, info = text.step(mask.argmax(axis=1))
        if mode == "Disabled" and done.any():
            obs, info = text.reset(options={"reset_mask": done})


def test_a_masked_token_is_refused_and_so_is_what_cannot_mask():
    single = TextEnv(tiny.task(), reference_top_k=2, kl_coef=0.0)
    obs, info = single.reset(seed=0)
    assert info["action_mask"].tolist() == single.action_masks().astype(int).tolist()
    with pytest.raises(ValueError, match="not among the 2 that reference_top_k allows"):
        single.step(int(info["action_mask"].argmin()))
    with pytest.raises(ValueError, match="rollout generates without asking the reference"):
        rollout(single, policy(env()).lm, episodes=2)
    with pytest.raises(ValueError, match="LMPolicy does not read action masks"):
        LMPolicy.for_mdp(single.mdp, tiny.gpt2())
    with pytest.raises(ValueError, match="MDP face"):
        TextBanditVectorEnv(tiny.task(), 2, reference_top_k=2)
    with pytest.raises(ValueError, match="reference_top_k must be at least 1"):
        TextEnv(tiny.task(), reference_top_k=0)


def test_masks_of_all_tokens_change_nothing():
    plain, masked = (TextVectorEnv(tiny.task(), 4, **options) for options in ({}, {"reference_top_k": 10}))
    for text in (plain, masked):
        text.reset(seed=1)
    for _ in range(12):
        lm_envs.report(plain, np.full(4, -1.0)), lm_envs.report(masked, np.full(4, -1.0))
        actions = np.array([1, 2, 0, 3])
        np.testing.assert_allclose(plain.step(actions)[1], masked.step(actions)[1], atol=1e-12)
    assert masked.action_masks().all()


def test_maskable_ppo_learns_saves_and_predicts(tmp_path):
    venv = VecMonitor(TextVecEnv(TextVectorEnv(tiny.task(), 8, reference_top_k=5)))
    settings = WHOLE | dict(n_epochs=4, stats_window_size=40, seed=0)
    still = contrib.MaskablePPO(MaskableCausalLMActorCriticPolicy, venv, learning_rate=0.0, **settings)
    model = contrib.MaskablePPO(MaskableCausalLMActorCriticPolicy, venv, learning_rate=1e-2, **settings)
    assert mean_return(model.learn(8 * 96)) > mean_return(still.learn(3 * 96)) + 0.5
    model.save(tmp_path / "model.zip")
    obs = venv.reset()
    masks = np.stack(venv.env_method("action_masks"))
    actions, _ = contrib.MaskablePPO.load(tmp_path / "model.zip").predict(obs, action_masks=masks)
    assert masks[np.arange(8), np.asarray(actions)].all() and actions.logprob.shape == (8,)


def test_distributions_and_values_have_gradients_where_they_are_asked_for():
    actor = policy(venv := env())
    rows = torch.as_tensor(venv.reset())
    actions = torch.tensor([2, 3, 2, 3, 1, 1, 0, 0])
    values, logprob, entropy = actor.evaluate_actions(rows, actions)
    distribution = actor.get_distribution(rows)
    torch.testing.assert_close(distribution.log_prob(actions), logprob)
    torch.testing.assert_close(distribution.entropy(), entropy)
    torch.testing.assert_close(actor.predict_values(rows), values)
    for x in (distribution.log_prob(actions), actor.predict_values(rows)):
        assert torch.autograd.grad(x.sum(), actor.lm.model.transformer.wte.weight)[0].abs().sum() > 0


def test_the_example_runs_shortened(capsys):
    found = example().main(tokens=2 * 8 * 24, rows=8, texts=16)
    assert set(found) == {"ppo", "a2c", "maskable-ppo"} and all(np.isfinite(line).all() for line in found.values())
    assert capsys.readouterr().out.count("gold") == 4


def test_what_the_page_shows_runs(capsys):
    page = (Path(__file__).resolve().parents[2] / "docs" / "stable_baselines3.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/stable_baselines3.md", "exec"), {"__name__": "page"})
        assert capsys.readouterr().out.strip()
    assert len(blocks) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "a2c", "maskable-ppo"])
def test_gold_reward_rises_over_sft_by_two_standard_errors(name):
    before, before_se, after, after_se, _, _ = example().main(name)[name]
    assert after - before > 2 * np.hypot(before_se, after_se)
