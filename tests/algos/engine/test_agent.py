"""The engine: law 8 (micro-batches), law 7 (ratio 1 at first), law 10 (resume), refusal of NaN, and bookkeeping."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from lm_envs.algos.engine import agent as agent_module
from lm_envs.algos.engine.agent import learn
from lm_envs.algos.engine.batching import Before, flatten_fixed, micro_batches, minibatches, units
from lm_envs.algos.engine.metrics import Averages, describe
from lm_envs.algos.registry import load, make_agent
from lm_envs.training import stream
from lm_envs.trajectories import demonstrations
from tests import tiny
from tests.algos import batches
from tests.marks import slow_unless


class Spy:
    """Keeps the gradient of every Adam step, unclipped."""

    def __init__(self, agent, monkeypatch):
        self.found = []
        take = agent.optimizer.step

        def step(*args, **kwargs):
            self.found.append(batches.gradients(agent.policy))
            return take(*args, **kwargs)

        monkeypatch.setattr(agent.optimizer, "step", step)


def first_gradient(agent, traj, monkeypatch):
    spy = Spy(agent, monkeypatch)
    agent.update(traj)
    return spy.found[0]


def distance(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_unless(
        lambda case: case[1] == "mdp" or case[0] in ("reinforce", "grpo", "ppo", "expert-iteration"),
        [(n, "mdp") for n in batches.LEARNERS] + [(n, "bandit") for n in batches.SAMPLERS],
    ),
)
def test_law_8_the_micro_batch_size_does_not_change_the_gradient(name, kind, monkeypatch):
    traj = batches.batch_for(name, kind)
    whole, parts = (
        first_gradient(
            batches.learner(name, kind, micro_batch=size, epochs=1, minibatches=1, max_grad_norm=1e9), traj, monkeypatch
        )
        for size in (None, 3)
    )
    assert distance(whole, parts) < 1e-9
    assert distance(whole, {k: torch.zeros_like(v) for k, v in whole.items()}) > 1e-3


@pytest.mark.parametrize("name", ["a2c", "reinforce", "reward-modelling"])
def test_law_8_negative_control_equal_weights_per_micro_batch(name, monkeypatch):
    """Weighting every part the same (a mean of means) is wrong, and the comparison sees it."""
    traj = batches.batch_for(name)
    whole = first_gradient(batches.learner(name, max_grad_norm=1e9), traj, monkeypatch)
    real, size = units, 5
    calls = {"whole": None}

    def equal(part, unit):
        if calls["whole"] is None:
            calls["whole"] = len(micro_batches(part, unit, size))
            return calls["whole"]
        return 1

    assert len({real(traj.select(rows), "token") for rows in micro_batches(traj, "sequence", size)}) > 1
    monkeypatch.setattr(agent_module, "units", equal)
    wrong = first_gradient(batches.learner(name, micro_batch=size, max_grad_norm=1e9), traj, monkeypatch)
    assert distance(whole, wrong) > 1e-4


def test_law_8_minibatches_of_different_size_are_each_a_mean_over_their_own_units(monkeypatch):
    """Two minibatches' gradients, weighted by tokens, add up to the whole batch's (no Adam step in between)."""
    traj = batches.text_batch()
    whole = first_gradient(batches.learner("ppo", epochs=1, minibatches=1, max_grad_norm=1e9), traj, monkeypatch)
    agent = batches.learner("ppo", epochs=1, minibatches=3, max_grad_norm=1e9)
    found = []
    monkeypatch.setattr(agent.optimizer, "step", lambda: found.append(batches.gradients(agent.policy)))
    agent.update(traj)
    tokens = [int(traj.mask[rows].sum()) for rows in minibatches(traj, "token", 3, np.random.default_rng((0, 0, 0)))]
    total = {n: sum(g[n] * t for g, t in zip(found, tokens, strict=True)) / sum(tokens) for n in whole}
    assert distance(whole, total) < 1e-9


def test_transitions_of_control_may_be_cut_anywhere(monkeypatch):
    traj, policy = batches.control_batch()
    settings = dict(episodes=6, group_size=1, epochs=1, minibatches=1, max_grad_norm=1e9)
    whole, parts = (
        first_gradient(make_agent("ppo", copy.deepcopy(policy), micro_batch=size, **settings), traj, monkeypatch)
        for size in (None, 7)
    )
    assert distance(whole, parts) < 1e-9


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_flattened_transitions_have_the_gradient_of_padded_rows(name, monkeypatch):
    """The engine cuts feed-forward batches by transitions; the loss over padded rows must be the same."""
    traj, policy = batches.control_batch()
    settings = dict(episodes=6, epochs=1, minibatches=1, max_grad_norm=1e9)
    flat = first_gradient(make_agent(name, copy.deepcopy(policy), **settings), traj, monkeypatch)
    padded_policy = copy.deepcopy(policy)
    padded_policy.sequence_obs = True  # keeps the engine from flattening
    padded = first_gradient(make_agent(name, padded_policy, **settings), traj, monkeypatch)
    assert distance(flat, padded) < 1e-9


def test_flatten_fixed_goes_with_flatten():
    traj, _ = batches.control_batch()
    fixed = flatten_fixed({"steps": traj.reward.cumsum(1), "row": torch.arange(len(traj))}, traj.mask)
    flat = traj.flatten()
    assert fixed["steps"].shape == (len(flat), 1) and fixed["row"].shape == (len(flat),)
    lengths = traj.lengths.tolist()
    assert fixed["steps"][: lengths[0], 0].tolist() == list(range(1, lengths[0] + 1))
    assert fixed["row"].tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
@pytest.mark.parametrize("name", [n for n in batches.LEARNERS if hasattr(load(n).Config, "clip")] + ["ppo-klpen"])
def test_law_7_the_ratio_is_one_and_the_sampled_logprob_is_the_policys(name, kind):
    agent = batches.learner(name, kind, epochs=1, minibatches=1)
    metrics = agent.update(batches.text_batch(kind))
    assert metrics["ratio"] == pytest.approx(1, abs=1e-12)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-12)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-12)
    assert metrics.get("clip_fraction", 0) == 0
    assert metrics["logprob_gap_max"] < 1e-9


def test_law_7_negative_control_another_temperature_shows_in_the_gap():
    agent = batches.learner("ppo", epochs=1, minibatches=1)
    agent.policy.temperature = 1.2
    assert agent.update(batches.text_batch())["logprob_gap_max"] > 1e-3


def test_a_gap_is_told_only_where_the_policy_read_the_batch():
    """A batch given from outside may be of an older policy, whose log-probabilities are right to differ."""
    for name, read in (("rloo", False), ("ppo", True)):
        metrics = batches.learner(name, epochs=1, minibatches=1).update(batches.text_batch())
        assert ("logprob_gap_max" in metrics) == read and "sampler_kl" in metrics


def test_the_ratio_leaves_one_after_the_first_step():
    metrics = batches.learner("ppo", epochs=4, minibatches=1, learning_rate=1e-2).update(batches.text_batch())
    assert metrics["ratio_max"] > 1.01 and metrics["approx_kl"] > 1e-5


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_weights_are_touched(where, monkeypatch):
    agent = batches.learner("ppo", minibatches=1, epochs=1)
    traj = batches.text_batch()
    if where == "loss":
        traj.reward[0, 0] = float("nan")
    else:
        agent.policy.value_head.bias.register_hook(lambda gradient: gradient * float("nan"))
    start = batches.weights(agent.policy)
    with pytest.raises(FloatingPointError, match="ppo.*nan.*iteration 0.*weights were left"):
        agent.update(traj)
    assert batches.same(start, batches.weights(agent.policy))
    assert not agent.optimizer.state


@pytest.mark.parametrize("name", batches.LEARNERS)
def test_law_1_nan_in_masked_positions_changes_no_weight(name):
    clean, dirty = batches.batch_for(name), batches.batch_for(name)
    for field in ("logprob", "reward", "ref_logprob"):
        if getattr(dirty, field) is not None:
            assert not dirty.mask.all()
            setattr(dirty, field, torch.where(dirty.mask, getattr(dirty, field), float("nan")))
    ends = []
    for traj in (clean, dirty):
        agent = batches.learner(name, minibatches=2 if name in ("ppo", "sft", "quark") else 1)
        agent.update(traj)
        ends.append(batches.weights(agent.policy))
    assert batches.same(*ends)


def test_law_1_control_nan_beyond_the_end():
    clean, policy = batches.control_batch()
    dirty, _ = batches.control_batch()
    assert not dirty.mask.all()
    for field in ("obs", "reward", "logprob"):
        value = getattr(dirty, field)
        mask = dirty.mask.reshape(*dirty.mask.shape, *([1] * (value.ndim - 2)))
        setattr(dirty, field, torch.where(mask, value, float("nan")))
    ends = []
    for traj in (clean, dirty):
        agent = make_agent("ppo", copy.deepcopy(policy), episodes=6)
        agent.update(traj)
        ends.append(batches.weights(agent.policy))
    assert batches.same(*ends)


def test_law_1_negative_control_nan_in_a_real_position_is_seen():
    traj = batches.text_batch()
    traj.reward[3, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        batches.learner("a2c").update(traj)


def test_metrics_are_exact_over_parts_of_any_size():
    traj = batches.text_batch()
    whole = batches.learner("ppo", epochs=1, minibatches=1).update(traj)
    parts = batches.learner("ppo", epochs=1, minibatches=1, micro_batch=3).update(traj)
    for name in ("loss", "policy_loss", "value_loss", "entropy", "ratio", "explained_variance", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-9, abs=1e-12), name


def test_averages_by_hand():
    averages = Averages()
    averages.add({"a": torch.tensor(1.0), "b": (torch.tensor(6.0), torch.tensor(2)), "c_max": torch.tensor(3.0)}, 1)
    averages.add({"a": torch.tensor(4.0), "b": (torch.tensor(0.0), torch.tensor(4)), "c_max": torch.tensor(2.0)}, 3)
    assert averages.means() == {"a": 13 / 4, "b": 1.0, "c_max": 3.0}


def test_describe_by_hand():
    traj = batches.text_batch()
    found = describe(traj)
    lengths = (traj.response >= 0).sum(1).double()
    assert found["length"] == pytest.approx(float(lengths.mean()))
    rows = [float((traj.logprob - traj.ref_logprob)[i][traj.mask[i]].sum()) for i in range(len(traj))]
    assert found["kl"] == pytest.approx(np.mean(rows))
    assert found["return"] == pytest.approx(found["score"] - 0.1 * found["kl"])


def test_learning_rate_falls_to_zero_over_the_iterations():
    agent = batches.learner("a2c", iterations=4, learning_rate=0.4)
    traj = batches.text_batch()
    assert [agent.update(traj)["learning_rate"] for _ in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert agent.learning_rate == 0
    flat = batches.learner("a2c", iterations=4, learning_rate=0.4, anneal=False)
    assert [flat.update(traj)["learning_rate"] for _ in range(2)] == [0.4, 0.4]


def test_kl_stop_leaves_the_batch_before_the_step():
    traj = batches.text_batch()
    settings = dict(epochs=4, minibatches=1, learning_rate=1e-2)
    free = batches.learner("ppo", **settings).update(traj)
    assert free["updates"] == 4
    stopped = batches.learner("ppo", kl_stop=1e-4, **settings)
    assert stopped.update(traj)["updates"] == 1  # the second minibatch sees what the first did
    once = batches.learner("ppo", **(settings | {"epochs": 1}))
    once.update(traj)
    assert batches.same(batches.weights(stopped.policy), batches.weights(once.policy))


@pytest.mark.parametrize("name", ["a2c", "ppo", "ppo-klpen", "reinforce", "grpo", "dr-grpo"])
def test_entropy_is_a_mean_over_real_tokens(name):
    """By hand, of a batch with much padding; and so is its bonus in the loss, where there is one."""
    traj = batches.text_batch()
    assert traj.mask.float().mean() < 0.9
    agent = batches.learner(name, epochs=1, minibatches=1)
    now = agent.policy.evaluate(traj)
    rows = [
        [float(h) for h, real in zip(*row, strict=True) if real]
        for row in zip(now.entropy.detach(), traj.mask, strict=True)
    ]
    by_hand = sum(map(sum, rows)) / sum(map(len, rows))
    fixed = agent.prepare(traj, Before(agent.policy, traj))
    found = agent.loss(traj, now, fixed)
    reported = found[1]["entropy"]
    assert float(reported[0] / reported[1] if isinstance(reported, tuple) else reported) == pytest.approx(by_hand)
    if name in ("a2c", "ppo", "ppo-klpen"):
        agent.config.entropy_coef = 0.5
        assert float(found[0] - agent.loss(traj, now, fixed)[0]) == pytest.approx(0.5 * by_hand)


def test_each_epoch_and_each_iteration_cuts_other_minibatches(monkeypatch):
    agent = batches.learner("ppo", epochs=3, minibatches=2)
    seen = []
    step = agent._step

    def noted(traj, *rest):
        seen.append(tuple(sorted(traj.prompt_index.tolist())))
        return step(traj, *rest)

    monkeypatch.setattr(agent, "_step", noted)
    traj = batches.text_batch()
    traj.prompt_index = torch.arange(len(traj))
    for _ in range(2):
        agent.update(traj)
    passes = [frozenset(seen[i : i + 2]) for i in range(0, 12, 2)]
    assert len(set(passes)) == 6
    assert all(sorted(sum(halves, ())) == list(range(16)) for halves in passes)


def test_minibatches_cover_every_row_once_and_keep_groups_whole():
    traj = batches.text_batch(episodes=24, group_size=4)
    rng = np.random.default_rng(0)
    for unit, count in (("token", 5), ("sequence", 7), ("group", 4)):
        parts = list(minibatches(traj, unit, count, rng))
        assert sorted(torch.cat(parts).tolist()) == list(range(24))
        assert len(parts) == count
        if unit == "group":
            assert all((torch.bincount(traj.group[part])[traj.group[part]] == 4).all() for part in parts)
    pieces = micro_batches(traj, "group", 6)
    assert sorted(torch.cat(pieces).tolist()) == list(range(24))
    assert all(len(piece) == 4 for piece in pieces)  # two groups would be eight rows
    assert [len(piece) for piece in micro_batches(traj, "sequence", 10)] == [10, 10, 4]
    with pytest.raises(ValueError, match="unit"):
        units(traj, "word")


@pytest.mark.parametrize("name", batches.REWARDED)
def test_learning_from_rewards_needs_rewards(name):
    with pytest.raises(ValueError, match="learns from rewards"):
        batches.learner(name).update(demonstrations(batches.texts(), 2, 6, [0] * 12))


def test_a_loss_over_groups_needs_groups():
    traj, _ = batches.control_batch()
    with pytest.raises(ValueError, match="group"):
        units(traj, "group")


def test_stream_passes_over_everything_and_can_start_in_the_middle():
    whole = [next_batch for _, next_batch in zip(range(6), stream(7, 3, seed=1), strict=False)]
    assert sorted(np.concatenate(whole)[:7].tolist()) == list(range(7))
    assert np.concatenate(whole)[:7].tolist() != np.concatenate(whole)[7:14].tolist()
    later = [next_batch for _, next_batch in zip(range(3), stream(7, 3, seed=1, start=3), strict=False)]
    assert np.array_equal(np.stack(whole[3:]), np.stack(later))


def test_before_is_evaluated_only_when_read_and_in_parts():
    traj = batches.text_batch()
    policy = batches.text_policy(batches.text_env())
    lazy, parts = Before(policy, traj), Before(policy, traj, 5)
    assert not lazy.was_read
    torch.testing.assert_close(lazy.logprob, parts.logprob)
    torch.testing.assert_close(lazy.value, parts.value)
    torch.testing.assert_close(lazy.entropy, parts.entropy)
    torch.testing.assert_close(lazy.log_probs(), parts.log_probs())
    assert lazy.was_read and not lazy.value.requires_grad


def through_json(counters):
    return json.loads(json.dumps(counters))


# What makes a checkpoint of an algorithm hold more than weights, moments and counters.
STATE = {
    "reinforce": {"baseline": "running_mean", "alpha": 0.5},
    "a2c": {"critic": "q"},
    "ppo": {"kl_target": 2.0, "kl_horizon": 50.0},
    "grpo": {"kl_target": 2.0, "kl_horizon": 50.0},
    "expert-iteration": {"restart": True},
}
# The others that have state of their own, or data to go on with.
KEEPING = ("sft", "dpo", "vbon", "bond", "quark", "ppo-klpen", "ppo-ptx", "iterated-rlhf")


@pytest.mark.parametrize("name", slow_unless(lambda name: name in STATE or name in KEEPING, batches.LEARNERS))
def test_law_10_a_restored_agent_continues_bit_for_bit(name):
    env, changes = batches.env_for(name), STATE.get(name, {})
    agent = batches.learner(name, env=env, **changes)
    learn(agent, env, 2)
    tensors, counters = agent.checkpoint()
    twin_env = batches.env_for(name)
    twin = batches.learner(name, env=twin_env, **changes)
    with torch.no_grad():
        for parameter in twin.policy.parameters():
            parameter.add_(1.0)  # whatever the twin starts from must not matter
    twin.restore(tensors, through_json(counters))
    learn(agent, env, 2)
    learn(twin, twin_env, 2)
    assert batches.same(batches.weights(agent.policy), batches.weights(twin.policy))
    assert agent.checkpoint()[1] == twin.checkpoint()[1]
    assert batches.same(agent.checkpoint()[0], twin.checkpoint()[0])


def test_law_10_negative_control_without_adams_moments_it_does_not():
    env = batches.text_env()
    agent = batches.learner("a2c", env=env)
    learn(agent, env, 2)
    tensors, counters = agent.checkpoint()
    twin = batches.learner("a2c", env=env)
    twin.restore({k: v for k, v in tensors.items() if not k.startswith("adam.")}, counters)
    learn(agent, env, 1)
    learn(twin, env, 1)
    assert not batches.same(batches.weights(agent.policy), batches.weights(twin.policy))


@pytest.mark.parametrize(
    ("name", "settings"), [("ppo", {"steps": 32, "episodes": None}), ("reinforce", {"episodes": 4, "group_size": 1})]
)
def test_law_10_control(name, settings):
    """The run that wrote the checkpoint goes on as the one restored from it: both start fresh episodes there."""
    settings = settings | {"iterations": 6}
    if name == "reinforce":
        settings["baseline"] = "value"
    ends = []
    for killed in (False, True):
        env = batches.control_env()
        agent = make_agent(name, batches.MLPPolicy(env, hidden=(8,)), **settings)
        learn(agent, env, 2)
        tensors, counters = agent.checkpoint()
        if killed:
            env = batches.control_env()
            agent = make_agent(name, batches.MLPPolicy(env, hidden=(8,), seed=5), **settings)
            agent.restore(tensors, through_json(counters))
        learn(agent, env)
        ends.append(batches.weights(agent.policy))
    assert batches.same(*ends)


def test_env_steps_are_counted_as_taken():
    env = batches.control_env(rows=4)
    agent = make_agent("ppo", batches.MLPPolicy(env), steps=32, episodes=None)
    learn(agent, env, 3)
    assert agent.steps_done == 3 * 32
    agent = make_agent("reinforce", batches.MLPPolicy(env), episodes=4, group_size=1, baseline="value")
    traj, _ = agent.iteration(env)
    assert agent.steps_done == 4 * int(traj.lengths.max()) > agent.tokens_done == int(traj.mask.sum())


def test_a_checkpoint_shares_no_memory_and_is_no_pickle():
    agent = batches.learner("a2c")
    agent.update(batches.text_batch())
    tensors, counters = agent.checkpoint()
    assert len({t.data_ptr() for t in tensors.values()}) == len(
        tensors
    )  # tied weights too: safetensors refuses shared memory
    assert through_json(counters) == counters


def test_a_checkpoint_of_another_policy_is_refused():
    tensors, counters = batches.learner("a2c").checkpoint()
    other = make_agent("a2c", batches.control_batch()[1])
    with pytest.raises(ValueError, match="another policy"):
        other.restore(tensors, counters)


def test_iteration_counts_and_reports():
    env = batches.text_env()
    agent = batches.learner("ppo", env=env)
    seen = []
    learn(agent, env, 2, callback=lambda agent, traj, metrics: seen.append((traj, metrics)))
    (first, _), (second, metrics) = seen
    assert metrics["episodes"] == 32 and metrics["reward_calls"] == 32 and metrics["iteration"] == 1
    assert metrics["tokens"] == int((first.response >= 0).sum() + (second.response >= 0).sum())
    assert second.group.min() == first.group.max() + 1  # the next episodes, not the same again
    wanted = (
        "return score kl entropy ratio ratio_max clip_fraction approx_kl explained_variance length value_loss grad_norm"
    )
    missing = {*wanted.split(), "learning_rate", "tokens_per_second", "kl_coef"} - metrics.keys()
    assert not missing


def test_no_global_generator_is_touched():
    env = batches.text_env()
    agent = batches.learner("ppo", env=env)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the point is that nobody draws from it
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    learn(agent, env, 1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_the_adaptive_coefficient_reaches_the_env():
    env = batches.text_env()
    agent = batches.learner("reinforce", env=env, kl_coef=0.2, kl_target=0.5, kl_horizon=16.0)
    _, first = agent.iteration(env)
    _, second = agent.iteration(env)
    assert first["kl_coef"] == 0.2 and first["kl"] > 0.6
    answer = 2 * min(first["kl"] / 0.5 - 1, 1)
    assert second["kl_coef"] == pytest.approx(0.2 * math.exp(0.2 / 16 + answer)) == env.kl_coef
    fixed = batches.learner("reinforce", env=env, kl_coef=0.7)
    assert fixed.iteration(env)[1]["kl_coef"] == 0.7 == env.kl_coef
    env.set_kl_coef(0.4)
    assert batches.learner("reinforce", env=env).iteration(env)[1]["kl_coef"] == 0.4


def test_the_controllers_kl_is_in_nats_per_sequence():
    env = batches.text_env()
    measured = batches.learner("reinforce", env=env).iteration(env)[1]
    target = measured["kl"] / 1.1  # a little below; per token the KL is far below
    assert measured["kl"] / measured["length"] < 0.8 * target
    env = batches.text_env()
    agent = batches.learner("reinforce", env=env, kl_coef=0.2, kl_target=target, kl_horizon=16.0)
    agent.iteration(env)
    assert agent.iteration(env)[1]["kl_coef"] == pytest.approx(0.2 * math.exp(0.1 / 16 + 0.2))


def test_dropout_stays_off_in_every_forward():
    """DETAILS 11: with dropout the ratio of the first update would not be 1."""
    env = batches.text_env()
    model = tiny.gpt2(seed=1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    policy = batches.LMPolicy.for_mdp(env.mdp, model.requires_grad_(True)).train()
    traj = batches.text_batch()
    first, second = (policy.evaluate(traj).logprob for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.detach(), batches.text_policy(env).evaluate(traj).logprob.detach())
    model.train()  # negative control
    assert not torch.equal(policy.evaluate(traj).logprob, policy.evaluate(traj).logprob)


def test_wrong_pairings_of_agent_and_env_are_refused():
    env = batches.text_env(group_size=2)
    with pytest.raises(ValueError, match="group_size=2"):
        batches.learner("reinforce").iteration(env)
    with pytest.raises(ValueError, match="episodes"):
        batches.learner("ppo", steps=64, group_size=2).iteration(env)
    with pytest.raises(ValueError, match="needs an env"):
        batches.learner("ppo").iteration()
    control = batches.control_env(rows=3)
    agent = make_agent("ppo", batches.MLPPolicy(control), steps=32, episodes=None)
    with pytest.raises(ValueError, match="multiple of the env's 3"):
        agent.iteration(control)
    agent = make_agent("ppo", batches.MLPPolicy(control), episodes=2, kl_target=1.0)
    with pytest.raises(ValueError, match="kl_target"):
        agent.iteration(control)
