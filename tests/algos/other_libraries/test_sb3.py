"""Stable-Baselines3 unmodified: cached and teacher-forced steps, the exact penalty, saving, and that it learns."""

import importlib.util
import re
import sys
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
pytest.importorskip("sb3_contrib")  # the example needs it
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnvWrapper, VecMonitor

from lm_envs.algos.other_libraries.sb3 import CausalLMActorCriticPolicy, TextVecEnv, ToldActions
from lm_envs.env.rollout import collect
from lm_envs.env.vector import TextVectorEnv
from tests import tiny
from tests.algos.other_libraries.sb3_pieces import WHOLE, Recorder, env, mean_return, policy
from tests.house import CHECKOUT


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


def test_the_seed_of_the_library_decides():
    def tokens(seed):
        model = PPO(CausalLMActorCriticPolicy, env(), seed=seed, learning_rate=0.0, n_epochs=1, **WHOLE)
        return model.learn(96).rollout_buffer.actions.copy()

    assert (tokens(1) == tokens(1)).all() and (tokens(1) != tokens(2)).any()


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


# The example and the page


def example():
    file = CHECKOUT / "examples" / "sb3_reviews.py"
    spec = importlib.util.spec_from_file_location("example_sb3", file)
    sys.modules["example_sb3"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_example_runs_shortened(capsys):
    found = example().main(tokens=2 * 8 * 24, rows=8, texts=16)
    assert set(found) == {"ppo", "a2c", "maskable-ppo"} and all(np.isfinite(line).all() for line in found.values())
    assert capsys.readouterr().out.count("gold") == 4


def test_what_the_page_shows_runs(capsys):
    page = (CHECKOUT / "docs" / "stable_baselines3.md").read_text(encoding="utf-8")
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
