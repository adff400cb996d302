"""What the algorithms report beside their loss, and the numbers that decide what they learn from, computed again."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lm_envs import rng
from lm_envs.algos import iterated_rlhf
from lm_envs.algos.best_of_n import BestOfN
from lm_envs.algos.engine import comparisons, judged_pairs
from lm_envs.algos.engine.agent import learn
from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.comparisons import annotated_pairs
from lm_envs.algos.engine.judged_pairs import judge_pairs, make_reward_model
from lm_envs.algos.engine.preference_losses import drift
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import load, make_agent
from lm_envs.tasks.sampling import SAMPLE_EPISODES
from tests import tiny
from tests.algos import batches


def figures(metrics):
    return {key: float(x[0] / x[1]) if isinstance(x, tuple) else float(x) for key, x in metrics.items()}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def moved(agent):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def log_ratios(agent, traj):
    now = agent.policy.evaluate(traj)
    gap = torch.where(traj.mask, now.logprob - (0 if traj.ref_logprob is None else traj.ref_logprob), 0.0)
    return now, gap.sum(dim=1).tolist()


# Preferences


@pytest.mark.parametrize("normalized", [False, True])
def test_a_pairs_margin_and_accuracy(normalized):
    agent = batches.learner("dpo", beta=0.4, length_normalized=normalized)
    batch = next(agent.batches())
    moved(agent)
    now, ratio = log_ratios(agent, batch)
    ratio = [r / n if normalized else r for r, n in zip(ratio, batch.response_lengths.tolist(), strict=True)]
    groups: dict[int, list] = {}
    for group, rank, value in zip(batch.group.tolist(), batch.rank.tolist(), ratio, strict=True):
        groups.setdefault(group, []).append((rank, value))
    margins = [
        [a - b for i, a in rows for j, b in rows if i < j] for rows in groups.values()
    ]  # by group, better minus worse
    flat = [x for row in margins for x in row]
    found = figures(agent.loss(batch, now, {})[1])
    assert found["margin"] == pytest.approx(0.4 * sum(flat) / len(flat))
    assert found["accuracy"] == pytest.approx(sum(x > 0 for x in flat) / len(flat)) and 0 < found["accuracy"] < 1
    loss = [sum(-math.log(sigmoid(0.4 * x)) for x in row) / len(row) for row in margins]
    assert found["dpo_loss"] == pytest.approx(sum(loss) / len(loss))


def test_a_tie_orders_nothing_rightly():
    for name, loss in (("dpo", {"loss": "sigmoid"}), ("reward-modelling", {})):
        agent = batches.learner(name, **loss)
        batch = next(agent.batches())
        still = torch.zeros_like(batch.ref_logprob) if name == "dpo" else None
        now = SimpleNamespace(logprob=batch.ref_logprob if name == "dpo" else still, score=torch.zeros(len(batch)))
        assert figures(agent.loss(batch, now, {})[1])["accuracy"] == 0


def test_ktos_metrics_and_weights():
    agent = batches.learner("dpo", loss="kto", beta=0.4, wanted_weight=1.5, unwanted_weight=0.5, episodes=9)
    batch = next(agent.batches())
    rank = batch.rank.tolist()
    ratio = [1.0 if k < 0 else (0.5, 2.0, -1.0)[i % 3] for i, k in enumerate(rank)]  # some between 0 and the baseline
    shift = torch.zeros_like(batch.ref_logprob)
    shift[:, 0] = torch.tensor(ratio)
    now = SimpleNamespace(logprob=batch.ref_logprob + shift)
    other = [r for r, k in zip(ratio, rank, strict=True) if k < 0]
    z = max(0.0, sum(other) / len(other))
    labeled = [(r, k == 0) for r, k in zip(ratio, rank, strict=True) if k >= 0]
    found = figures(agent.loss(batch, now, {})[1])
    loss = [1.5 * sigmoid(0.4 * (z - r)) if wanted else 0.5 * sigmoid(0.4 * (r - z)) for r, wanted in labeled]
    assert found["dpo_loss"] == pytest.approx(sum(loss) / len(loss))
    assert found["accuracy"] == pytest.approx(sum((r > z) == wanted for r, wanted in labeled) / len(labeled))
    for name, which in (("wanted_reward", True), ("unwanted_reward", False)):
        rewards = [0.4 * r for r, wanted in labeled if wanted == which]
        assert found[name] == pytest.approx(sum(rewards) / len(rewards))


def test_ktos_baseline_is_never_negative_and_is_used_in_parts():
    """A policy that makes mismatched responses less likely: the mean log-ratio is below 0, the baseline 0."""
    agent = batches.learner("dpo", loss="kto", episodes=9, micro_batch=2)
    batch = next(agent.batches())
    ratio = torch.tensor([-1.0, -3.0])
    assert drift(ratio) == 0 and drift(-ratio) == 2
    moved(agent)
    _, other = log_ratios(agent, batch.select(batch.rank < 0))
    labeled = batch.select(batch.rank >= 0)
    _, own = log_ratios(agent, labeled)
    expected = max(0.0, sum(other) / len(other))
    metrics = agent.update(batch)
    assert metrics["kl_baseline"] == pytest.approx(expected)
    right = [(r > expected) == (k == 0) for r, k in zip(own, labeled.rank.tolist(), strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))


def test_online_dpo_reports_the_gap_of_all_groups_and_skips_those_without_one(monkeypatch):
    agent, traj, seen = batches.learner("online-dpo"), batches.text_batch(), []
    traj.score = torch.tensor(
        [0.0, 2.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 3.0, -1.0, 0.0, 0.0, 5.0, 5.0, 4.0, 5.0]
    ).double()
    monkeypatch.setattr(load("online-dpo").__mro__[1], "update", lambda self, rows: seen.append(rows) or {})
    assert agent.update(traj)["score_gap"] == pytest.approx((2 + 0 + 4 + 1) / 4)
    assert [row.tolist() for row in seen[0].response] == [traj.response[i].tolist() for i in (1, 0, 8, 9, 12, 14)]
    assert seen[0].group.tolist() == [0, 0, 1, 1, 2, 2] and seen[0].rank.tolist() == [0, 1] * 3


def test_ranks_go_by_the_score_and_not_by_the_penalized_return():
    """The KL penalty is no part of what an episode is worth to those that choose among episodes."""
    traj = batches.text_batch()
    traj.score, traj.reward = torch.arange(16.0).double(), -torch.arange(16.0).double()[:, None] * traj.mask
    metrics = batches.learner("expert-iteration", epochs=1).update(traj)
    assert metrics["kept_score"] == pytest.approx((3 + 7 + 11 + 15) / 4)
    assert metrics["sampled_score"] == pytest.approx(7.5)
    overall = batches.learner("expert-iteration", epochs=1, keep_by="overall", keep=2).update(traj)
    assert overall["kept_score"] == pytest.approx(sum(range(8, 16)) / 8)
    blind = batches.learner("expert-iteration", epochs=1, keep_by="random", keep=2).update(traj)
    assert blind["kept_score"] == pytest.approx((0 + 1 + 4 + 5 + 8 + 9 + 12 + 13) / 8)


# Quark, vBoN, best-of-n


def test_quarks_metrics(monkeypatch):
    agent, traj = batches.learner("quark", quantiles=4, entropy_coef=0.3, kl_coef=0.2), batches.text_batch()
    traj.score = torch.arange(16.0).double().roll(5)
    found = agent.update(traj)
    assert found["pool"] == 16 and found["best_quantile_score"] == pytest.approx((12 + 13 + 14 + 15) / 4)
    moved(agent)
    plain = traj.select(slice(None))
    now = agent.policy.evaluate(plain)
    loss, metrics = agent.loss(plain, now, {})
    metrics, reference = figures(metrics), agent.reference.evaluate(plain).log_probs()
    kl = (now.log_probs().exp() * (now.log_probs() - reference)).sum(-1)[plain.mask].mean()
    entropy, nll = now.entropy[plain.mask].mean(), -now.logprob[plain.mask].mean()
    assert metrics["token_kl"] == pytest.approx(kl.item()) and kl.item() > 0.05
    assert metrics["entropy"] == pytest.approx(entropy.item()) and metrics["nll"] == pytest.approx(nll.item())
    assert loss.item() == pytest.approx((nll + 0.2 * kl - 0.3 * entropy).item())


def test_quark_draws_by_the_seed_and_the_iteration(monkeypatch):
    def drawn(seed, iteration, most=5):
        agent, seen = batches.learner("quark", seed=seed, learn_episodes=most), []
        agent.iterations_done = iteration
        monkeypatch.setattr(load("quark").__mro__[1], "update", lambda self, rows: seen.append(rows) or {})
        traj = batches.text_batch()
        traj.score = torch.arange(16.0).double()
        agent.update(traj)
        return tuple(seen[0].score.tolist())

    assert len({drawn(0, 0), drawn(1, 0), drawn(0, 1), drawn(1, 1)}) == 4 and drawn(1, 1) == drawn(1, 1)
    assert sorted(drawn(0, 0, most=None)) == list(range(16)) and len(drawn(0, 0)) == 5


def test_vbons_samples_and_its_gain():
    agent, env = batches.learner("vbon", n=3, reference_samples=4, seed=5), batches.text_env()
    rows = np.array([1, 4])
    found = agent._reference_scores(rows)
    policy = LMPolicy.for_mdp(env.mdp, env.mdp.reference)
    for row, scores in zip(rows, found, strict=True):
        episodes = SAMPLE_EPISODES + 4 * row + np.arange(4)
        uniforms = torch.as_tensor(rng.uniform(5, rng.TOKEN, episodes[:, None], np.arange(6)))
        response, _ = policy.respond(torch.as_tensor(env.mdp.prompt(np.full(4, row))), uniforms)
        assert scores.tolist() == sorted(float((r == 2).sum() - (r == 3).sum()) for r in response)
    traj = batches.text_batch()
    metrics = agent.update(traj)
    gains = []
    for index, score in zip(traj.prompt_index.tolist(), traj.score.tolist(), strict=True):
        held = agent._scores[index].tolist()
        low, high = sum(x < score for x in held) / 5, (sum(x <= score for x in held) + 1) / 5
        gains.append(math.log((high**3 - low**3) / (high - low)))
    assert metrics["log_gain"] == pytest.approx(sum(gains) / 16)


def test_best_of_n_counts_every_token_and_every_score():
    env = batches.text_env()
    policy = BestOfN(batches.text_policy(env), env.mdp, 3)
    index = np.arange(10) % 5
    prompts = torch.as_tensor(env.mdp.prompt(index))
    uniforms = torch.rand(10, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = batches.text_policy(env).respond(prompts.repeat_interleave(3, 0), uniforms.reshape(30, 6))[0]
    assert bool((whole == 0).any())  # EOS is a token like others
    policy.answer(torch.as_tensor(index), prompts, uniforms)
    assert policy.tokens_generated == int((whole >= 0).sum()) and policy.reward_calls == 30


# Iterated RLHF


def recorded(monkeypatch, module, name):
    calls, whole = [], getattr(module, name)

    def call(*given, **options):
        result = whole(*given, **options)
        calls.append((given, options, result))
        return result

    monkeypatch.setattr(module, name, call)
    return calls


def test_each_rounds_pairs_model_and_cost(monkeypatch):
    pairs, made = (
        recorded(monkeypatch, iterated_rlhf, "judge_pairs"),
        recorded(monkeypatch, iterated_rlhf, "make_reward_model"),
    )
    env = batches.env_for("iterated-rlhf")
    settings = {"rounds": 3, "annotations": 50, "held_out": 10, "iterations": 5, "seed": 7}
    model = {"rm_steps": 5, "rm_batch": 6, "rm_learning_rate": 1e-3, "rm_weight_decay": 0.3, "rm_start": "task"}
    agent = batches.learner("iterated-rlhf", env=env, **settings, **model)
    found = []
    learn(agent, env, callback=lambda agent, traj, metrics: found.append((traj, metrics)))
    # Iterations 0, 2 and 4 of five are the first of their third.
    assert [metrics.get("round") for _, metrics in found] == [0, None, 1, None, 2]
    assert [(first, count, seed) for (_, _, first, count, seed), _, _ in pairs] == [
        (0, 16, 7), (16, 10, 7), (26, 16, 7), (42, 10, 7), (52, 16, 7), (68, 10, 7)
    ]  # fmt: skip
    theirs = {"start": "task", "steps": 5, "batch_size": 6, "learning_rate": 1e-3, "weight_decay": 0.3}
    assert [options for _, options, _ in made] == [{**theirs, "seed": seed} for seed in (7, 8, 9)]
    units = pairs[1][2].read_by(batches.learned_task().reward)
    assert [given[3] for given, _, _ in made] == [units] * 3
    assert agent.comparisons_done == 48 and len(agent._choices) == 48
    assert agent.samples_done == 5 * 16 + 2 * 3 * 26
    written = sum(int(traj.response_lengths.sum()) for traj, _ in found)
    assert agent.tokens_done == written + sum(sum(map(len, judged.samples.completion_ids)) for *_, judged in pairs)
    held = [pairs[i][2] for i in (1, 3, 5)]
    rewards = [batches.learned_task().reward, *(reward for *_, reward in made)]
    starts = [metrics for _, metrics in found if "round" in metrics]
    assert [m["rm_accuracy_before"] for m in starts] == [h.accuracy(r) for h, r in zip(held, rewards, strict=False)]
    assert [m["rm_accuracy"] for m in starts] == [h.accuracy(r) for h, r in zip(held, rewards[1:], strict=True)]
    assert [m["annotations"] for m in starts] == [16, 32, 48]


@pytest.mark.parametrize("settings", [{"rm_start": "task"}, {"value_from": "reward_model"}, {}])
def test_iterated_rlhf_pays_for_the_tasks_reward_model_where_it_starts_from_it(settings):
    config = load("iterated-rlhf").Config(**settings)
    assert load("iterated-rlhf").uses_reward.fget(SimpleNamespace(config=config)) == bool(settings)


def test_judged_pairs_are_what_their_numbers_say():
    """Pair k's prompt and responses are functions of k, and the judge reads them."""
    judge = lambda prompts, completions, **_: [100.0 + text.split().count("a") for text in completions]  # noqa: E731
    mdp = batches.KINDS["mdp"](tiny.task(judge=judge), 8).mdp
    policy = batches.text_policy(batches.text_env())
    judged = judge_pairs(mdp, policy, 300, 260, 4)  # 520 responses, more than a forward takes
    for k in (0, 1, 255, 256, 259):
        row = int(rng.integers(4, rng.PROMPT, SAMPLE_EPISODES + 300 + k, len(mdp.prompts)))
        episodes = SAMPLE_EPISODES + 600 + 2 * k + np.arange(2)
        uniforms = torch.as_tensor(rng.uniform(4, rng.TOKEN, episodes[:, None], np.arange(6)))
        response, _ = policy.respond(torch.as_tensor(mdp.prompt(np.array([row, row]))), uniforms)
        ids = [r[r >= 0].tolist() for r in response]
        assert judged.samples.completion_ids[2 * k : 2 * k + 2] == ids
        assert judged.gold[k].tolist() == [100.0 + r.count(1) for r in ids]
    assert judged.tokens == sum(map(len, judged.samples.completion_ids))
    reward = batches.learned_task().reward
    ends = [ids[-1] == 0 for ids in judged.samples.completion_ids]
    read = [row for pair in judged.read_by(reward) for row in pair]
    assert [row[-1] == 0 for row in read] == ends and 0 < sum(ends) < len(ends)


def test_a_reward_model_is_trained_by_its_settings(monkeypatch):
    seen = []
    fit = lambda *given, **options: seen.append((given, options))  # noqa: E731
    monkeypatch.setattr(judged_pairs.training, "fit_reward_model", fit)
    template = batches.learned_task().reward
    pairs, choices = [[[1, 2], [3]], [[4], [5, 6]]], np.array([True, False])
    settings = {"steps": 3, "batch_size": 2, "learning_rate": 0.1, "weight_decay": 0.7}
    made = [
        make_reward_model(template, pairs, choices, pairs, "made", start=start, seed=seed, **settings)
        for start, seed in (("fresh", 1), ("fresh", 2), ("task", 1))
    ]
    for (_, given, rank), options in seen:
        assert given is pairs and rank.tolist() == [[0, 1], [1, 0]]
        assert options == {**settings, "seed": options["seed"]}
    assert [options["seed"] for _, options in seen] == [1, 2, 1]
    one, two, own = (reward.model.state_dict() for reward in made)
    assert not torch.equal(one["score.weight"], two["score.weight"])
    assert not torch.equal(one["transformer.wte.weight"], two["transformer.wte.weight"])
    assert all(torch.equal(t, own[name]) for name, t in template.model.state_dict().items())


# Annotated pairs


def test_sampled_pairs_are_the_tasks_and_the_seeds(monkeypatch):
    def judge(prompts, completions, number, **_):
        return [10.0 * n + text.split().count("a") for text, n in zip(completions, number, strict=True)]

    columns = {"train": {"number": [5, 6, 7, 8, 9]}, "test": {"number": [0, 0]}}
    task = tiny.task(judge=judge, columns=columns, temperature=0.6, min_new_tokens=2)
    sampled, chosen = (
        recorded(monkeypatch, comparisons.sampling, "sample"),
        recorded(monkeypatch, comparisons, "annotate"),
    )
    data = annotated_pairs(task, 7, 0.0, seed=3)
    (_, options, samples), (gold, how, _) = sampled[0], chosen[0]
    assert (options["temperature"], options["min_new_tokens"], options["seed"], how["seed"]) == (0.6, 2, 3, 3)
    rows = [i // 2 % 5 for i in range(14)]
    assert [r[r >= 0].tolist() for r in data.prompt] == [task.prompts["train"][i] for i in rows]
    expected = [10.0 * (5 + i) + ids.count(1) for i, ids in zip(rows, samples.completion_ids, strict=True)]
    assert np.stack(gold[:2], axis=1).ravel().tolist() == expected
    given = tiny.task(judge=judge, columns=columns, pairs=[(4, [1, 0], [2, 0]), (2, [3, 0], [1, 1, 0])])
    annotated_pairs(given, 2, 0.0, seed=3)
    assert np.stack(chosen[1][0][:2], axis=1).tolist() == [[91, 90], [70, 72]]


def test_a_seed_of_ones_own_reaches_the_annotators(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lm_envs.algos.engine.agent.annotated_pairs", lambda *given: seen.append(given[1:]) or batches.ranked()
    )
    make_agent("dpo", batches.text_policy(batches.text_env()), batches.text_task(), pairs=9, flip=0.1, seed=4)
    assert seen == [(9, 0.1, 4)]


def test_remax_and_rloo_are_prepared_without_the_discount_being_forgotten():
    traj = batches.text_batch()
    agent = batches.learner("remax", gamma=0.5)
    with torch.no_grad():
        found = agent.prepare(traj, Before(agent.policy, traj))["advantage"]
    greedy = agent._greedy_score(traj)
    for i, n in enumerate(traj.lengths.tolist()):
        reward, later = traj.reward[i, :n].tolist(), 0.0
        for t in reversed(range(n)):
            later = reward[t] + 0.5 * later
            assert float(found[i, t]) == pytest.approx(later - float(greedy[i]))
