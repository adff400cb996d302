"""The text environments step by step: hand-computed rewards, masks, reports, autoreset, infos and errors."""

import re
import warnings
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import lm_envs
from lm_envs.env.rows import render_text
from lm_envs.env.single import TextBanditEnv, TextEnv
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from tests import tiny


def reference_logprobs(task, obs, prompt_length, temperature=1.0):
    """Token by token, without padding or cache."""
    prompt = obs[:prompt_length][obs[:prompt_length] >= 0]
    response = obs[prompt_length:][obs[prompt_length:] >= 0]
    text = torch.as_tensor(np.concatenate([prompt, response]))
    logits = task.reference(input_ids=text[None]).logits[0] / temperature
    steps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    return steps.gather(1, torch.as_tensor(response)[:, None]).squeeze(1).numpy()


def test_rewards_are_score_minus_reported_kl():
    task = tiny.task()
    env = TextEnv(task, kl_coef=0.25, temperature=0.8)
    env.reset(seed=3)
    actions, logprobs, rewards = [2, 3, 2, 2, tiny.EOS], [-0.5, -1.0, -0.25, -2.0, -0.125], []
    for action, logprob in zip(actions, logprobs, strict=True):
        lm_envs.report(env, logprob)
        obs, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
    assert terminated and not truncated
    reference = reference_logprobs(task, obs, env.mdp.prompt_length, 0.8)
    expected = 0.25 * (reference - logprobs)
    expected[-1] += 3 - 1  # three b, one c, on the EOS
    np.testing.assert_allclose(rewards, expected, atol=1e-12)
    lm = info["lm"]
    assert lm["score"] == 2 and lm["finish_reason"] == "stop" and lm["response"] == " b c b b"  # behind the prompt
    assert lm["kl"] == pytest.approx(np.sum(logprobs) - reference.sum())
    np.testing.assert_allclose(lm["ref_logprob"][:5], reference, atol=1e-12)
    assert set(info) == {"lm"}  # info["episode"] belongs to the wrappers


def test_a_negative_penalty_is_not_clamped():
    env = TextEnv(tiny.task(), kl_coef=1.0)
    obs, _ = env.reset(seed=0)
    lm_envs.report(env, -30.0)  # far less likely than under the reference: the penalty is a gain
    assert env.step(1)[1] > 0


def test_the_horizon_terminates_and_scores():
    env = TextEnv(tiny.task(), kl_coef=0.0)
    env.reset(seed=0)
    for step in range(6):
        obs, reward, terminated, truncated, info = env.step(2)
        assert reward == (6 if step == 5 else 0)
    assert terminated and not truncated and info["lm"]["finish_reason"] == "length"


@pytest.mark.parametrize(("option", "score"), [(None, 6), (("replace", -1.0), -1), (("subtract", 2.5), 3.5)])
def test_missing_eos_replaces_or_subtracts(option, score):
    for env, step in [(TextEnv, 6 * [2]), (TextBanditEnv, [6 * [2]])]:
        env = env(tiny.task(), kl_coef=0.0, missing_eos=option)
        env.reset(seed=0)
        assert sum(env.step(action)[1] for action in step) == score
        env.reset(seed=0)
        step = [2, tiny.EOS] if len(step) > 1 else [[2, tiny.EOS, 2, 2, 2, 2]]
        assert sum(env.step(action)[1] for action in step) == 1  # an answer that stopped is left alone


def test_minimum_length_masks_eos():
    env = TextEnv(tiny.task(), kl_coef=0.0, min_new_tokens=2)
    _, info = env.reset(seed=0)
    assert info["action_mask"].tolist() == [0] + 9 * [1]
    with pytest.raises(ValueError, match="row 0 ended after 0 tokens, but min_new_tokens=2"):
        env.step(tiny.EOS)
    env.step(1)
    _, _, _, _, info = env.step(1)
    assert info["action_mask"].tolist() == 10 * [1] and env.action_masks().all()
    assert env.step(tiny.EOS)[2]


def test_minimum_length_refuses_a_whole_response_that_is_too_short():
    env = TextBanditEnv(tiny.task(), kl_coef=0.0, min_new_tokens=2)
    for tokens in (0, 1):
        env.reset(seed=0)
        with pytest.raises(ValueError, match=f"row 0 ended after {tokens} tokens, but min_new_tokens=2"):
            env.step([*[2] * tokens, tiny.EOS, 2, 2, 2, 2, 2][:6])
    env.reset(seed=0)
    assert env.step([2, 2, tiny.EOS, 2, 2, 2])[1] == 2


def test_the_mask_is_part_of_the_reference():
    """The penalty compares distributions under one mask: the reference has no EOS to lose probability to."""
    task = tiny.task()
    env = TextEnv(task, kl_coef=1.0, min_new_tokens=1)
    obs, _ = env.reset(seed=0)
    prompt = torch.as_tensor(obs[obs >= 0])
    logits = task.reference(input_ids=prompt[None]).logits[0, -1].clone()
    logits[tiny.EOS] = float("-inf")
    lm_envs.report(env, -1.0)
    assert env.step(4)[1] == pytest.approx(float(torch.log_softmax(logits, 0)[4]) + 1.0)


def test_unreported_logprobs_warn_once_and_charge_the_reference_half():
    env = TextEnv(tiny.task(), kl_coef=0.5)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="only the reference's half"):
        obs, reward, *_ = env.step(4)
    assert reward == pytest.approx(0.5 * reference_logprobs(env.task, obs, env.mdp.prompt_length)[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.step(4)


@pytest.mark.parametrize("env", [TextEnv, TextBanditEnv])
def test_an_episode_knows_nothing_of_the_one_before_in_its_row(env):
    """Without a penalty the reference is not asked: what it said before must not pass for new."""
    env = env(tiny.task(), kl_coef=0.5, render_mode="ansi")
    bandit = env.is_bandit
    action = np.full(env.mdp.max_new_tokens, tiny.EOS) if bandit else tiny.EOS
    env.reset(seed=0)
    lm_envs.report(env, -30.0)
    known = env.step(action)[4]["lm"]
    assert known["kl"] < 0 and "ref_logprob" in known and (bandit or "48;5;" in env.render())
    lm_envs.set_kl_coef(env, 0.0)
    env.reset()
    lm_envs.report(env, -30.0)
    assert not {"kl", "ref_logprob"} & set(env.step(action)[4]["lm"])
    assert "48;5;" not in env.render()  # no color where the KL is not known


@pytest.mark.parametrize("value", [np.zeros(2), float("nan"), float("-inf"), 0.5])
def test_a_report_that_is_no_logprob_is_refused(value):
    env = TextEnv(tiny.task())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="report expects"):
        lm_envs.report(env, value)


def test_vector_reports_have_one_number_per_row_and_pass_wrappers():
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(TextVectorEnv(tiny.task(), 3))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(3,\), got shape \(2,\)"):
        lm_envs.report(env, np.zeros(2))
    lm_envs.report(env, np.zeros(3))
    lm_envs.set_kl_coef(env, 0.75)
    assert env.unwrapped.kl_coef == 0.75
    with pytest.raises(TypeError, match="holds no text environment"):
        lm_envs.report(gymnasium.make("CartPole-v1"), 0.0)
    with pytest.raises(ValueError, match="kl_coef"):
        lm_envs.set_kl_coef(env, -1)


def test_sync_vector_env_of_several_shares_one_model():
    task = tiny.task()
    env = SyncVectorEnv([lambda: TextEnv(task, kl_coef=0.5) for _ in range(3)], autoreset_mode=AutoresetMode.SAME_STEP)
    assert len({id(member.unwrapped.task.reference) for member in env.envs}) == 1
    env.reset(seed=0)
    lm_envs.report(env, [-1.0, -2.0, -3.0])
    _, rewards, *_ = env.step(np.array([4, 4, 4]))
    charged = [rewards[i] - 0.5 * (i + 1) for i in range(3)]
    assert all(c < 0 for c in charged)


def drive(env, mode, steps=40):
    """Random tokens; what was seen of each finished episode, in the order of the rows, and how resets looked."""
    generator = np.random.default_rng(5)
    obs, _ = env.reset(seed=11)
    finals = []
    done = np.zeros(env.num_envs, dtype=bool)
    for _ in range(steps):
        if mode is AutoresetMode.DISABLED and done.any():
            obs, _ = env.reset(options={"reset_mask": done})
        waiting = done & (mode is AutoresetMode.NEXT_STEP)
        before = obs
        obs, reward, terminated, truncated, info = env.step(generator.integers(0, 3, env.num_envs))
        assert not truncated.any() and not (terminated & waiting).any()
        assert (reward[waiting] == 0).all()
        done = terminated
        for row in done.nonzero()[0]:
            if mode is AutoresetMode.SAME_STEP:
                final, lm = info["final_obs"][row], info["final_info"]["lm"]
                assert (obs[row, env.mdp.prompt_length :] == -1).all()
            else:
                final, lm = obs[row], info["lm"]
            assert lm["response"][row] == env.mdp.texts(*np.split(final[None], [env.mdp.prompt_length], axis=1))[1][0]
            finals.append(final.tolist())
        assert ((obs != before).any(axis=1) | done | waiting).all()
    return finals


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_autoreset_modes(mode):
    env = TextVectorEnv(tiny.task(), 4, kl_coef=0.0, autoreset_mode=mode)
    assert env.metadata["autoreset_mode"] is mode
    finals = drive(env, mode)
    assert len(finals) > 10
    prompts = {tuple(final[:4]) for final in finals}
    assert len(prompts) > 2


def test_disabled_autoreset_refuses_a_finished_row():
    env = TextVectorEnv(tiny.task(), 2, kl_coef=0.0, autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(np.array([tiny.EOS, 1]))
    with pytest.raises(RuntimeError, match=r"rows \[0\] have finished"):
        env.step(np.array([1, 1]))


def test_prompts_follow_seed_episode_and_group_alone():
    task = tiny.task()
    single = TextEnv(task, group_size=3)
    prompts = [single.reset(seed=9)[0].tolist()] + [single.reset()[0].tolist() for _ in range(8)]
    assert prompts[0] == prompts[1] == prompts[2] and prompts[3] == prompts[4] == prompts[5]
    vector = TextVectorEnv(task, 9, group_size=3)
    assert vector.reset(seed=9)[0].tolist() == prompts
    assert vector.reset(seed=9, options={"first_episode": 4})[0][:5].tolist() == prompts[4:]


@pytest.mark.parametrize("env_class", [TextBanditEnv, TextBanditVectorEnv])
def test_bandit_reads_up_to_the_first_eos(env_class):
    task = tiny.task()
    env = env_class(task, kl_coef=0.5)
    env.reset(seed=2)
    action = np.array([2, 2, tiny.EOS, 3, 3, 3])
    batched = env_class is TextBanditVectorEnv
    lm_envs.report(env, [-4.0] if batched else -4.0)
    obs, reward, terminated, _, info = env.step(action[None] if batched else action)
    lm = info["final_info"]["lm"] if batched else info["lm"]
    final = info["final_obs"][0] if batched else obs
    reference = reference_logprobs(task, final, env.mdp.prompt_length).sum()
    assert np.all(terminated)
    assert np.squeeze(reward) == pytest.approx(2 + 0.5 * (reference + 4))
    assert np.squeeze(lm["kl"]) == pytest.approx(-4 - reference)


def test_render_shows_text_colored_by_kl():
    env = TextEnv(tiny.task(), kl_coef=0.5, render_mode="ansi")
    env.reset(seed=0)
    plain = env.render()
    lm_envs.report(env, -0.001)
    env.step(4)
    assert "\x1b[30;48;5;" in env.render() and env.render().endswith("d\x1b[0m")
    assert plain in env.render()


def test_what_a_text_holds_does_not_steer_the_terminal():
    words = {1: "\x1b[2J\x1b]0;owned\x07", 2: "\x9b31m", 3: "\u202egnp", 4: "plain"}
    decode = SimpleNamespace(decode=lambda ids, **_: "".join(words[i] for i in ids))
    mdp = SimpleNamespace(task=SimpleNamespace(tokenizer=decode), prompt_length=1)
    shown = render_text(mdp, np.array([1, 2, 3, 4, -1]), np.array([0.0, 1.0, -1.0, np.nan]))
    texts = re.sub("\x1b\\[(0|1|30;48;5;[0-9]+)m", "|", shown)  # our own colors
    assert texts == "|\\x1b[2J\\x1b]0;owned\\x07|\\x9b31m|\\u202egnp||plain|"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "no split 'dev'; it has train, test"),
        ({"kl_coef": -0.1}, "kl_coef must be finite and not negative"),
        ({"kl_coef": float("nan")}, "kl_coef must be finite and not negative, got nan"),
        ({"kl_coef": "0.1"}, "kl_coef must be finite and not negative, got '0.1'"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"temperature": float("nan")}, "temperature must be a finite number, not nan"),
        ({"temperature": float("inf")}, "temperature must be a finite number, not inf"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens must be a whole number, not nan"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, not 2.5"),
        ({"min_new_tokens": 0.5}, "min_new_tokens must be a whole number, not 0.5"),
        ({"group_size": 1.5}, "group_size must be a whole number, not 1.5"),
        ({"reference_top_k": float("nan")}, "reference_top_k must be a whole number or none, not nan"),
        ({"missing_eos": ("replace", float("nan"))}, r"missing_eos\[1\] must be a finite number or none, not nan"),
        ({"min_new_tokens": 9}, "min_new_tokens must lie between 0 and max_new_tokens=6"),
        ({"missing_eos": ("drop", 1.0)}, r"missing_eos\[0\] must be 'replace' or 'subtract' or none, not 'drop'"),
        ({"group_size": 0}, "group_size"),
        ({"max_new_tokens": 61}, "more than the model's context of 64"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextEnv(tiny.task(), **options)


@pytest.mark.parametrize("first", [-1, 1.7, float("nan"), "3"])
def test_a_first_episode_that_is_none_is_refused(first):
    with pytest.raises(ValueError, match=r"options\['first_episode'\] must be a whole number of at least 0"):
        TextEnv(tiny.task()).reset(seed=0, options={"first_episode": first})


def test_a_number_of_rows_that_is_none_is_refused():
    for rows in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="num_envs must be a whole number of at least 1"):
            TextVectorEnv(tiny.task(), rows)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt 1 of split 'train' is empty"):
        TextEnv(tiny.task(prompts={"train": [[1], []]}))


def nan_reward(completions, **_):
    return [float("nan")] * len(completions)


def long_reward(completions, **_):
    return [0.0] * (len(completions) + 1)


@pytest.mark.parametrize("broken", [nan_reward, long_reward])
def test_a_broken_reward_is_named(broken):
    env = TextEnv(tiny.task(reward=broken), kl_coef=0.0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=f"reward .*{broken.__name__}"):
        env.step(tiny.EOS)


@pytest.mark.parametrize("action", [np.nan, 1.7, 1.0, np.inf, True, "a", None])
def test_actions_that_are_no_integers_are_refused(action):
    """A cast to int64 would make -2**63 of NaN, and 1 of 1.7."""
    whole = [action] + [1] * 5
    cases = [
        (TextEnv(tiny.task(), kl_coef=0.0), action),
        (TextVectorEnv(tiny.task(), 2, kl_coef=0.0), np.array([1, action])),
        (TextBanditEnv(tiny.task(), kl_coef=0.0), np.array(whole)),
        (TextBanditVectorEnv(tiny.task(), 2, kl_coef=0.0), np.array([whole, [1] * 6])),
    ]
    for env, actions in cases:
        if np.asarray(actions).dtype.kind in "iu":
            continue  # True beside integers is 1: numpy says so before the env sees it
        env.reset(seed=0)
        with pytest.raises(ValueError, match="actions must be token ids, which are integers"):
            env.step(actions)
        env.step(np.zeros(np.shape(actions), dtype=np.int32))  # nothing was taken: the env goes on


def test_actions_outside_the_vocabulary_are_refused():
    env = TextVectorEnv(tiny.task(), 2, kl_coef=0.0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action 10 of row 1 is no token"):
        env.step(np.array([1, 10]))
    with pytest.raises(ValueError, match=r"actions must have shape \(2,\)"):
        env.step(np.array([[1, 1]]))
