"""What text environments report, charge and count, by hand, where several tokens end a response."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import lm_envs
from lm_envs.env.mdp import TextMDP
from lm_envs.env.rollout import AHEAD, Collector, collect, rollout
from lm_envs.env.rows import _LIKELIER, _RARER, _colored
from lm_envs.env.single import TextEnv
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.rng import RESET, TOKEN, integers, uniform
from tests import tiny
from tests.algos import batches

MORE = (8, 9)


def several(**changes):
    return tiny.task(more_eos_token_ids=MORE, **changes)


@pytest.mark.parametrize("option", [None, ("replace", -3.0), ("subtract", 2.0)])
def test_any_end_stops_a_response(option):
    mdp = TextMDP(several(), missing_eos=option, kl_coef=0.0)
    response = np.array([[2, 2, 0, -1, -1, -1], [2, 2, 9, -1, -1, -1], [2, 2, 8, -1, -1, -1], [2] * 6])
    assert mdp.finish_reasons(response) == ["stop", "stop", "stop", "length"]
    cut = {None: 6.0, ("replace", -3.0): -3.0, ("subtract", 2.0): 4.0}[option]
    score = mdp.score(np.zeros(4, dtype=np.int64), response)
    assert score.sum(axis=1).tolist() == [2, 2, 2, cut] and score[3, :5].tolist() == [0] * 5
    texts = mdp.samples(np.zeros(4, dtype=np.int64), response)
    assert texts.completion_ids == [[2, 2, 0], [2, 2, 9], [2, 2, 8], [2] * 6]


def test_every_end_is_masked_early_on_every_path():
    mdp = TextMDP(several(min_new_tokens=2))
    assert mdp.action_mask(np.array([0, 1, 2])).tolist() == [[0, *[1] * 7, 0, 0]] * 2 + [[1] * 10]
    assert TextMDP(several(min_new_tokens=2), min_new_tokens=0).action_mask(np.array([0])) is None
    prompt, response = torch.tensor([[-1, 1, 2]]), torch.tensor([[3, 4, 9]])
    found = mdp.reference_logprob(prompt, response)[0]
    for t, token in enumerate((3, 4, 9)):
        logits = mdp.reference(input_ids=torch.tensor([[1, 2, 3, 4][: 2 + t]])).logits[0, -1].clone()
        if t < 2:
            logits[[0, 8, 9]] = -torch.inf
        assert float(found[t]) == pytest.approx(float(logits.log_softmax(-1)[token]))


def test_options_are_the_tasks_unless_given():
    task = several(temperature=0.7, min_new_tokens=2, kl_coef=0.3)
    mdp = TextMDP(task)
    assert (mdp.temperature, mdp.min_new_tokens, mdp.kl_coef, mdp.max_new_tokens) == (0.7, 2, 0.3, 6)
    assert mdp.explicit_kl_coef is None and mdp.charged_kl_coef == 0.3
    mdp = TextMDP(task, temperature=1.0, min_new_tokens=0, kl_coef=0.0, max_new_tokens=4, split="test")
    assert (mdp.temperature, mdp.min_new_tokens, mdp.kl_coef, mdp.max_new_tokens) == (1.0, 0, 0.0, 4)
    assert mdp.explicit_kl_coef == 0.0 and len(mdp.prompts) == 2
    env = TextEnv(task)
    lm_envs.set_kl_coef(env, 0.5)
    assert env.mdp.kl_coef == env.mdp.explicit_kl_coef == env.kl_coef == 0.5  # the caller's, as an agent will see
    long = tiny.task(prompts={"train": [[1], [2, 3]], "test": [[5, 6, 2, 1]]})
    assert TextMDP(long).prompt(np.array([1])).tolist() == [[-1, -1, 2, 3]]  # as wide as the longest of any split
    columns = {"train": {"n": [1, 2, 3, 4, 5]}, "test": {"n": [6, 7]}}
    assert TextMDP(tiny.task(columns=columns), split="test").columns(np.array([1, 0, 1])) == {"n": [7, 6, 7]}


@pytest.mark.parametrize("where", ["coefficient", "loss"])
def test_without_a_penalty_in_the_reward_nothing_need_be_reported(where):
    env = TextEnv(tiny.task(), kl_coef=0.0 if where == "coefficient" else 0.4)
    env.mdp.kl_in_reward = where == "coefficient"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.reset(seed=0)
        for _ in range(6):
            _, reward, terminated, _, info = env.step(4)
    assert terminated and reward == 0 and "ref_logprob" not in info["lm"] and "kl" not in info["lm"]


def test_a_missing_report_is_warned_of_once():
    env = TextVectorEnv(tiny.task(), 2, kl_coef=0.4)
    env.reset(seed=0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            env.step(np.array([4, 4]))
    assert len(found) == 1 and "did not report" in str(found[0].message)


@pytest.mark.parametrize("kind", [TextVectorEnv, TextBanditVectorEnv])
def test_reports_of_some_rows_are_those_rows(kind):
    """Rows that restart take no action: what the others report must not move."""
    env = kind(several(), 3, kl_coef=0.5, autoreset_mode=AutoresetMode.NEXT_STEP)
    env.reset(seed=1)
    if kind is TextVectorEnv:
        lm_envs.report(env, [-1.0, -2.0, -3.0])
        env.step(np.array([9, 2, 3]))  # row 0 ends
        lm_envs.report(env, [-0.0, -4.0, -5.0])
        _, rewards, _, _, infos = env.step(np.array([1, 9, 8]))
        prompts = env.mdp.prompts
        total = {1: ([2, 9], -6.0, 1.0), 2: ([3, 8], -8.0, -1.0)}
    else:
        env._done[0] = True  # as if it had ended in the step before
        lm_envs.report(env, [-1.0, -6.0, -8.0])
        _, rewards, _, _, infos = env.step(np.array([[9] * 6, [2, 9, 1, 1, 1, 1], [3, 8, 1, 1, 1, 1]]))
        prompts = env.mdp.prompts
        total = {1: ([2, 9], -6.0, 1.0), 2: ([3, 8], -8.0, -1.0)}
    assert rewards[0] == 0 and not infos["_lm"][0]
    for row, (tokens, reported, score) in total.items():
        prompt = torch.tensor([prompts[infos["lm"]["prompt_index"][row]]])
        reference = env.mdp.reference_logprob(prompt, torch.tensor([tokens]))[0]
        lm = {key: value[row] for key, value in infos["lm"].items() if key[0] != "_"}
        assert lm["score"] == score and lm["finish_reason"] == "stop"
        assert lm["kl"] == pytest.approx(reported - float(reference.sum()))
        assert lm["ref_logprob"].tolist() == pytest.approx([*reference.tolist(), 0, 0, 0, 0])


def test_a_seed_counts_in_all_its_bits_and_episodes_count_on():
    env = TextVectorEnv(tiny.task(), 4)
    low, high = (env.reset(seed=seed)[0][:, :4].tolist() for seed in (3, 3 + 2**40))
    assert low != high
    first = [env.mdp.prompt_index(3, np.arange(i, i + 4)).tolist() for i in (0, 4, 8)]
    env.reset(seed=3)
    found = [env._prompt_index.tolist()]
    for _ in range(2):
        env.reset()
        found.append(env._prompt_index.tolist())
    assert found == first
    env.reset(seed=3)  # counts from 0 again
    assert env._prompt_index.tolist() == first[0]


def test_log_probabilities_just_above_zero_are_rounding():
    env = TextEnv(tiny.task())
    lm_envs.report(env, 9e-4)
    with pytest.raises(ValueError, match="finite log-probabilities <= 0"):
        lm_envs.report(env, 2e-3)


@pytest.mark.parametrize(
    ("kl", "color"),
    [(0.09, None), (-0.09, None), (float("nan"), None), (0.1, _LIKELIER[0]), (0.8, _LIKELIER[1]), (9.0, _LIKELIER[3]),
     (-0.1, _RARER[0]), (-1.6, _RARER[2]), (-2.9, _RARER[3])],
)  # fmt: skip
def test_colors(kl, color):
    assert _colored("x", kl) == ("x" if color is None else f"\x1b[30;48;5;{color}mx\x1b[0m")


# Sampling


def test_groups_and_values_of_a_rollout_are_numbered_from_the_first_episode():
    env = batches.text_env(group_size=4)
    policy = batches.text_policy(env)
    traj = rollout(env, policy, episodes=10, first_episode=6, seed=2)
    assert traj.group.tolist() == [1, 1, *[2] * 4, *[3] * 4]
    assert traj.prompt_index.tolist() == env.mdp.prompt_index(2, np.arange(6, 16)).tolist()
    value = policy.evaluate(traj).value
    torch.testing.assert_close(traj.value, value.detach())
    assert torch.equal(collect(env, policy, episodes=10, first_episode=6, seed=2).group, traj.group)


class Long(gymnasium.Env):
    """Ends after 40 steps, or is cut after 35; pays 1 a step. The first observation tells the seed."""

    observation_space = gymnasium.spaces.Box(-1, 2**31, (1,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, cut=False):
        self.cut = cut

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = 0
        return np.array([-1.0 if seed is None else seed]), {}

    def step(self, action):
        self.taken += 1
        return np.array([0.0]), 1.0, self.taken == 40, self.taken >= (40 if not self.cut else 35), {}


class Noted:
    sequence_obs, uniforms_per_action = False, 1

    def __init__(self):
        self.seen = []

    def act(self, obs, uniforms):
        self.seen.append(uniforms.tolist())
        return np.zeros(len(obs), dtype=np.int64), np.zeros(len(obs))


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_a_collectors_numbers_returns_and_steps(mode):
    """The number of an action is that of its seed, episode and place, beyond a block of numbers too."""
    env, policy = SyncVectorEnv([Long, lambda: Long(cut=True)], autoreset_mode=mode), Noted()
    collector = Collector(env, policy, seed=5, first_episode=20)
    assert collector._obs[0].item() == int(integers(5, RESET, 20, 2**31))
    assert collector._obs[1].item() == int(integers(5, RESET, 20, 2**31)) + 1  # Gymnasium's rule for vectors
    other = Collector(env, Noted(), seed=5, first_episode=21)
    assert other._obs[0].item() == int(integers(5, RESET, 21, 2**31))
    collector = Collector(env, policy, seed=5, first_episode=20)
    traj = collector.episodes(4, 20)
    assert len(traj) == 4 and traj.lengths[:2].tolist() == [40, 35] and 35 > AHEAD
    for row in range(2):
        found = [step[row] for step in policy.seen[: (40, 35)[row]]]
        assert found == uniform(5, TOKEN, 20 + row, np.arange(len(found))).tolist()
    returns, lengths = collector.pop_finished()
    assert returns == [float(n) for n in lengths] and sorted(lengths)[:2] == [35, 35] and 40 in lengths
    ended = traj.terminated.tolist()
    assert [n == 40 for n in traj.lengths.tolist()] == ended == [not cut for cut in traj.truncated.tolist()]
    idle = 2 * len(policy.seen) - collector.steps_taken  # steps that only returned a first observation
    assert (idle > 0) == (mode is AutoresetMode.NEXT_STEP)
