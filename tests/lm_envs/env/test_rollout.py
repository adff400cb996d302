"""Law 2: the bulk path is the step path for any number of rows, refill order and autoreset mode; the MDP is the
bandit."""

from itertools import product

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.rollout import Collector, collect, rollout
from lm_envs.env.single import TextBanditEnv, TextEnv
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.reward.base import Clip, WeightedSum
from tests import tiny
from tests.marks import slow_unless

OPTIONS = dict(kl_coef=0.3, temperature=1.3, min_new_tokens=1, missing_eos=("subtract", 0.7), group_size=2)


def policy_for(env, kind="mdp"):
    return LMPolicy.for_mdp(env.unwrapped.mdp, tiny.gpt2(seed=1), bandit=kind == "bandit")


def assert_same(a, b):
    assert a.response.tolist() == b.response.tolist()
    assert a.prompt.tolist() == b.prompt.tolist()
    assert a.actions.tolist() == b.actions.tolist()
    assert a.mask.tolist() == b.mask.tolist()
    assert a.group.tolist() == b.group.tolist()
    assert a.obs.tolist() == b.obs.tolist()
    for name in ("logprob", "ref_logprob", "reward", "score"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("rows", "mode"),
    slow_unless(lambda case: case[0] == 7 or case[1] == AutoresetMode.SAME_STEP, product([1, 7, 64], AutoresetMode)),
)
def test_bulk_path_is_step_path(rows, mode):
    env = TextVectorEnv(tiny.task(), rows, autoreset_mode=mode, **OPTIONS)
    policy = policy_for(env)
    bulk = rollout(env, policy, episodes=24, first_episode=5, seed=4)
    assert_same(bulk, collect(env, policy, episodes=24, first_episode=5, seed=4))
    assert bulk.group.tolist() == [(5 + i) // 2 for i in range(24)]
    assert len(set(bulk.lengths.tolist())) > 3


def test_single_env_is_the_vector_env():
    env = TextEnv(tiny.task(), **OPTIONS)
    policy = policy_for(env)
    assert_same(rollout(env, policy, episodes=6, seed=4), collect(env, policy, episodes=6, seed=4))


def test_registered_wrappers_do_not_matter():
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(TextVectorEnv(tiny.task(), 3, **OPTIONS))
    policy = policy_for(env)
    assert_same(rollout(env, policy, episodes=6, seed=4), collect(env, policy, episodes=6, seed=4))


@pytest.mark.parametrize("rows", [1, 7])
def test_bandit_is_the_mdp(rows):
    task = tiny.task()
    mdp, bandit = TextVectorEnv(task, rows, **OPTIONS), TextBanditVectorEnv(task, rows, **OPTIONS)
    policy, whole = policy_for(mdp), policy_for(bandit, "bandit")
    steps = rollout(mdp, policy, episodes=12, seed=4)
    bulk = rollout(bandit, whole, episodes=12, seed=4)
    assert_same(bulk, collect(bandit, whole, episodes=12, seed=4))
    assert bulk.response.tolist() == steps.response.tolist()
    torch.testing.assert_close(bulk.reward.sum(1), steps.reward.sum(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(bulk.logprob.sum(1), steps.logprob.sum(1), rtol=0, atol=1e-9)
    single = collect(TextBanditEnv(task, **OPTIONS), whole, episodes=3, seed=4)
    assert single.response.tolist() == bulk.select(slice(0, 3)).trim().response.tolist()


def causal(prompts, completions, completion_ids, **columns):
    """Per token: its id over ten, whatever follows."""
    width = max(len(ids) for ids in completion_ids)
    return np.array([[i / 10 for i in ids] + [0.0] * (width - len(ids)) for ids in completion_ids])


causal.dense = True


def test_a_dense_reward_is_the_same_on_every_path():
    task = tiny.task(reward=causal)
    env = TextVectorEnv(task, 5, **OPTIONS)
    policy = policy_for(env)
    bulk = rollout(env, policy, episodes=10, seed=1)
    assert_same(bulk, collect(env, policy, episodes=10, seed=1))
    bandit = TextBanditVectorEnv(task, 5, **OPTIONS)
    whole = rollout(bandit, policy_for(bandit, "bandit"), episodes=10, seed=1)
    torch.testing.assert_close(whole.reward.sum(1), bulk.reward.sum(1), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="needs a reward per response"):
        TextVectorEnv(task, missing_eos=("replace", -1.0))


def test_a_sum_with_a_dense_part_is_the_same_on_every_path():
    """What pays once per response is paid at its end, not for every prefix."""
    task = tiny.task(reward=Clip(WeightedSum([(1.0, tiny.count_b_minus_c), (0.5, causal)]), -0.7, 1.2))
    env = TextVectorEnv(task, 5, **OPTIONS)
    policy = policy_for(env)
    bulk = rollout(env, policy, episodes=10, seed=1)
    assert_same(bulk, collect(env, policy, episodes=10, seed=1))
    assert len({round(x, 6) for x in bulk.score.tolist()}) > 5


class LateScore(TextVectorEnv):
    """Broken on purpose: the first step of an episode charges nothing."""

    def _move(self, actions, moving, reported, rewards):
        first = self._lengths == 0
        super()._move(actions, moving, reported, rewards)
        rewards[first] = 0.0


class StaleReference(TextVectorEnv):
    """Broken on purpose: the reference of a refilled row still sees the text before it."""

    def _start(self, rows):
        super()._start(rows)
        if self._decoder_started:
            self._decoder._obs[torch.as_tensor(rows)] = torch.as_tensor(self._obs[rows])

    @property
    def _decoder_started(self):
        return hasattr(self, "_decoder") and self._decoder._obs is not None


@pytest.mark.parametrize("broken", [LateScore, StaleReference])
def test_a_broken_env_is_caught(broken):
    env = broken(tiny.task(), 7, **OPTIONS)
    policy = policy_for(env)
    with pytest.raises(AssertionError):
        assert_same(rollout(env, policy, episodes=24, seed=4), collect(env, policy, episodes=24, seed=4))


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
def test_evaluation_agrees_with_what_was_sampled(kind):
    """Law 7: before the first update the ratio is 1 and, the policy being the reference, the KL is 0."""
    env = (TextVectorEnv if kind == "mdp" else TextBanditVectorEnv)(tiny.task(), 4, **OPTIONS)
    policy = LMPolicy.for_mdp(env.mdp, tiny.gpt2(seed=0), bandit=kind == "bandit")
    traj = rollout(env, policy, episodes=16, seed=2)
    now = policy.evaluate(traj)
    torch.testing.assert_close(now.logprob, traj.logprob, rtol=0, atol=1e-9)
    torch.testing.assert_close(traj.ref_logprob, traj.logprob, rtol=0, atol=1e-9)
    assert now.value.shape == (16, traj.mask.shape[1] + 1) and bool((now.value == 0).all())
    if kind == "mdp":
        full = now.log_probs()
        picked = full.gather(2, traj.actions.unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(picked[traj.mask], now.logprob[traj.mask])
        entropy = -(full.exp() * full.masked_fill(full.isinf(), 0)).sum(-1)
        torch.testing.assert_close(entropy[traj.mask], now.entropy[traj.mask])


def test_another_temperature_breaks_the_ratio():
    """Negative control of law 7."""
    env = TextVectorEnv(tiny.task(), 4, **OPTIONS)
    policy = policy_for(env)
    traj = rollout(env, policy, episodes=8)
    policy.temperature = 1.0
    assert (policy.evaluate(traj).logprob - traj.logprob).abs().max() > 0.01


def test_training_the_policy_leaves_its_cache_and_the_reference_right():
    task = tiny.task()
    before = {name: value.clone() for name, value in task.reference.state_dict().items()}
    env = TextVectorEnv(task, 4, **OPTIONS)
    policy = policy_for(env)
    collect(env, policy, episodes=4)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05)
    assert_same(rollout(env, policy, episodes=8), collect(env, policy, episodes=8))
    assert all(torch.equal(value, before[name]) for name, value in task.reference.state_dict().items())


def test_value_reads_the_state_before_the_token_and_ends_at_zero():
    env = TextVectorEnv(tiny.task(), 4, **OPTIONS)
    policy = policy_for(env)
    torch.nn.init.normal_(policy.value_head.weight)
    traj = rollout(env, policy, episodes=8)
    value = policy.evaluate(traj).value
    for row, length in enumerate(traj.lengths.tolist()):
        assert bool((value[row, length:] == 0).all())
    changed = traj.select(slice(None))
    changed.response = traj.response.clone()
    changed.response[:, 0] = (changed.response[:, 0] % 9) + 1
    other = policy.evaluate(changed).value
    torch.testing.assert_close(other[:, 0], value[:, 0])  # V_0 cannot know token 0
    long = traj.lengths > 1
    assert (other[long, 1] - value[long, 1]).abs().min() > 1e-6


def test_top_p_in_training_is_refused_with_its_reason():
    for option in ({"top_p": 0.9}, {"top_k": 5}):
        with pytest.raises(ValueError, match="support they leave moves with the policy"):
            LMPolicy(tiny.gpt2(), tiny.EOS, 4, 6, **option)


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="policy has 12 output tokens and the reference 10"):
        LMPolicy.for_mdp(TextEnv(tiny.task()).mdp, tiny.gpt2(vocab=12))


class TenSteps(gymnasium.Env):
    """Ends after a number of steps drawn at reset; observation: (draw, step)."""

    observation_space = gymnasium.spaces.Box(0, 100, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, limit=None):
        self.limit = limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.step_count = int(self.np_random.integers(1, 11)), 0
        return self._obs(), {}

    def _obs(self):
        return np.array([self.length, self.step_count], dtype=np.float32)

    def step(self, action):
        self.step_count += 1
        terminated = self.step_count == self.length
        truncated = self.limit is not None and self.step_count == self.limit and not terminated
        return self._obs(), float(self.step_count), terminated, truncated, {}


class Coin:
    """Acts by the uniform itself."""

    sequence_obs, uniforms_per_action = False, 1

    def act(self, obs, uniforms):
        return (uniforms < 0.3).astype(np.int64), np.where(uniforms < 0.3, np.log(0.3), np.log(0.7))


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_collector_cuts_control_episodes_rightly(mode):
    env = SyncVectorEnv([lambda: TenSteps(limit=7)] * 3, autoreset_mode=mode)
    traj = collect(env, Coin(), episodes=30, seed=1)
    assert len(traj) == 30
    for row in range(30):
        length, drawn = int(traj.lengths[row]), int(traj.obs[row, 0, 0])
        assert length == min(drawn, 7)
        assert traj.obs[row, :length, 1].tolist() == list(range(length))
        assert traj.reward[row, :length].tolist() == list(range(1, length + 1))
        assert bool(traj.terminated[row]) == (drawn <= 7) and bool(traj.truncated[row]) == (drawn > 7)
        assert traj.final_obs[row].tolist() == [drawn, length]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_fragments_continue_where_they_were_cut(mode):
    env = SyncVectorEnv([lambda: TenSteps()] * 2, autoreset_mode=mode)
    collector = Collector(env, Coin(), seed=1)
    parts = [collector.steps(4) for _ in range(10)]
    returns, lengths = collector.pop_finished()
    assert all(total == n * (n + 1) / 2 for total, n in zip(returns, lengths, strict=True)) and len(returns) > 5
    assert collector.pop_finished() == ([], [])
    for part in parts:
        cut = part.truncated
        assert cut.sum() <= 2 and bool((cut ^ part.terminated).all())
        for row in range(len(part)):
            steps = part.obs[row, : part.lengths[row], 1]
            assert steps.tolist() == list(range(int(steps[0]), int(steps[0]) + len(steps)))
            assert part.final_obs[row, 1] == steps[-1] + 1
    taken = sum(int(part.mask.sum()) for part in parts)
    assert taken == 80 if mode is not AutoresetMode.NEXT_STEP else taken < 80


def test_taking_the_first_to_finish_would_be_biased():
    """Negative control of the order of episodes: many rows, and the first that end are short ones."""
    env = SyncVectorEnv([lambda: TenSteps()] * 30, autoreset_mode=AutoresetMode.SAME_STEP)
    fair = collect(env, Coin(), episodes=30, seed=1).lengths.double().mean()
    collector = Collector(env, Coin(), seed=1)
    done = []
    while len(done) < 30:
        done += collector._step()
    assert np.mean([len(e.actions) for e in done[:30]]) < fair - 1
    assert 4.0 < fair < 7.0
