"""The losses of DPO's family: by hand, as each other's special cases, and as agents."""

import math
import typing
from types import SimpleNamespace

import pytest
import torch

from lm_envs.algos import registry
from lm_envs.algos.dpo import DPO, DPOConfig
from lm_envs.algos.engine.agent import learn
from lm_envs.algos.engine.comparisons import Labeled, mismatched, preferences
from lm_envs.algos.engine.preference_losses import PAIR_LOSSES, READS, REFERENCE_FREE, Loss
from lm_envs.algos.ops.losses import (
    conservative_dpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from lm_envs.benchmarks.commands.learn import Dpo
from lm_envs.env.vector import TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.tasks.enumerable import load as enumerable
from tests.algos import batches
from tests.algos.engine.preference_rest import at_rest, ipo_rest, wins

PAIR, TURNED = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
LOSSES = typing.get_args(Loss)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def softplus(x):
    return math.log(1 + math.exp(x))


# By hand


def test_pair_losses_by_hand():
    x, margin = rows([0.5, -1.0]), 1.5
    assert ipo_loss(x, PAIR, 0.4).item() == pytest.approx((margin - 1 / 0.8) ** 2)
    assert ipo_loss(x, TURNED, 0.4).item() == pytest.approx((-margin - 1 / 0.8) ** 2)
    right, wrong = softplus(-0.4 * margin), softplus(0.4 * margin)
    assert conservative_dpo_loss(x, PAIR, 0.4, 0.2).item() == pytest.approx(0.8 * right + 0.2 * wrong)
    assert robust_dpo_loss(x, PAIR, 0.4, 0.2).item() == pytest.approx((0.8 * right - 0.2 * wrong) / 0.6)
    assert simpo_loss(x, PAIR, 0.4, 0.25).item() == pytest.approx(softplus(0.25 - 0.4 * margin))


def test_orpo_by_hand():
    """A pair, and a ranking of three: the best wins two of its three pairs, the second one."""
    p = [0.5, 0.2, 0.1]
    odds = [math.log(q / (1 - q)) for q in p]
    x = rows([math.log(q) for q in p])
    pair = orpo_loss(x[:, :2], PAIR, 0.3).item()
    assert pair == pytest.approx(-math.log(p[0]) + 0.3 * softplus(odds[1] - odds[0]))
    three = orpo_loss(x, torch.tensor([[0, 1, 2]]), 0.3).item()
    ratio = sum(softplus(odds[j] - odds[i]) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    assert three == pytest.approx(-(2 * math.log(p[0]) + math.log(p[1])) / 3 + 0.3 * ratio)
    absent = torch.cat([x[:, :2], rows([float("nan")])], dim=1)
    assert orpo_loss(absent, torch.tensor([[0, 1, -1]]), 0.3).item() == pytest.approx(pair)
    certain = rows([0.0, -1.0]).requires_grad_()  # probability 1 has infinite odds
    orpo_loss(certain, PAIR, 0.3).backward()
    assert certain.grad.isfinite().all()


def test_kto_by_hand():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    found = kto_loss(rows(0.7, -0.4, 1.0), torch.tensor([True, False, False]), 0.2, 0.5, rows(1.5, 0.8, 0.8))
    terms = [1.5 * (1 - sigmoid(0.5 * 0.5)), 0.8 * (1 - sigmoid(0.5 * 0.6)), 0.8 * (1 - sigmoid(-0.5 * 0.8))]
    assert found.item() == pytest.approx(sum(terms) / 3)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_weight_counts_a_group_that_often(loss):
    """Twice the weight of each group is as good as each group twice, divided by the number of groups."""
    agent = batches.learner("dpo", loss=loss)
    batch = next(agent.batches())
    plain = float(agent.loss(batch, agent.policy.evaluate(batch), {})[0].detach())
    batch.weight = torch.full((len(batch),), 3.0)
    assert float(agent.loss(batch, agent.policy.evaluate(batch), {})[0].detach()) == pytest.approx(3 * plain)
    marked = batch.group == 0 if loss != "kto" else torch.arange(len(batch)) == 0
    batch.weight = marked.double()
    alone = batch.select(marked | (batch.rank < 0))
    units = len(torch.unique(batch.group)) if loss != "kto" else int((batch.rank >= 0).sum())
    found = float(agent.loss(batch, agent.policy.evaluate(batch), {})[0].detach())
    alone.weight = None
    assert found == pytest.approx(float(agent.loss(alone, agent.policy.evaluate(alone), {})[0].detach()) / units)


# What they reduce to


def test_smoothing_by_nothing_is_dpo():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=generator).double()
    rank = torch.tensor([[0, 1, 2], [2, 0, 1], [0, 1, -1], [1, 0, 0]])
    for loss in (conservative_dpo_loss, robust_dpo_loss):
        torch.testing.assert_close(loss(x, rank, 0.3, 0.0), dpo_loss(x, rank, 0.3))
    torch.testing.assert_close(simpo_loss(x, rank, 0.3, 0.0), dpo_loss(x, rank, 0.3))


def test_robust_dpo_is_unbiased_under_flips_and_conservative_dpo_is_the_flipped_likelihood():
    x, flip = rows([0.9, -0.6]), 0.3
    true = dpo_loss(x, PAIR, 0.5)
    robust = (1 - flip) * robust_dpo_loss(x, PAIR, 0.5, flip) + flip * robust_dpo_loss(x, TURNED, 0.5, flip)
    torch.testing.assert_close(robust, true)
    flipped = (1 - flip) * true + flip * dpo_loss(x, TURNED, 0.5)
    torch.testing.assert_close(conservative_dpo_loss(x, PAIR, 0.5, flip), flipped)
    assert abs(float(flipped - true)) > 0.1


def test_orpo_is_likelihood_and_an_odds_ratio():
    x = rows([-0.3, -1.2], [-0.7, -0.1])
    rank = torch.tensor([[0, 1], [1, 0]])
    odds = x - torch.log1p(-x.exp())
    torch.testing.assert_close(orpo_loss(x, rank, 0.0), -(x[0, 0] + x[1, 1]) / 2)
    torch.testing.assert_close(orpo_loss(x, rank, 0.4), orpo_loss(x, rank, 0.0) + 0.4 * dpo_loss(odds, rank, 1.0))


def test_kto_without_a_baseline_or_a_reward_is_indifferent():
    wanted = torch.tensor([True, False])
    assert kto_loss(rows(0.0, 0.0), wanted, 0.0, 0.5).item() == 0.5
    x = rows(0.3, 0.3).requires_grad_()
    kto_loss(x, wanted, 0.3, 0.5).backward()
    assert x.grad.tolist() == [-0.5 / 8, 0.5 / 8]  # -beta/4 at the baseline, the mean of two


def equal_lengths():
    return preferences([[[1, 2, 3, 4], [1, 2, 5, 6]], [[1, 3, 2, 2], [1, 3, 4, 0]]], [[0, 1], [1, 0]], 2, 2)


@pytest.mark.parametrize("loss", ["sigmoid", "cdpo", "robust"])
def test_of_equal_lengths_normalizing_divides_beta(loss):
    def end(**settings):
        policy = batches.text_policy(batches.text_env())
        agent = registry.make_agent(
            "dpo", policy, data=equal_lengths(), loss=loss, episodes=2, learning_rate=1e-2, iterations=4, **settings
        )
        return batches.weights(learn(agent).policy)

    normalized, plain = end(beta=0.6, length_normalized=True), end(beta=0.3)
    for name, found in normalized.items():
        torch.testing.assert_close(found, plain[name], rtol=1e-9, atol=1e-12)
    other = end(beta=0.6)
    assert any(not torch.allclose(other[name], plain[name]) for name in plain)


# As agents


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_orders_its_data(loss):
    agent = batches.learner("dpo", loss=loss, iterations=40, learning_rate=1e-2)
    first = agent.iteration()[1]
    if loss not in REFERENCE_FREE:
        start = {"ipo": (1 / 0.2) ** 2, "kto": 0.5, "robust": math.log(2)}.get(loss, math.log(2))
        assert first["dpo_loss"] == pytest.approx(start, abs=1e-6)
    learn(agent)
    last = agent.iteration()[1]
    assert last["accuracy"] > 0.8 and last["dpo_loss"] < first["dpo_loss"]
    if loss == "kto":
        assert last["wanted_reward"] > last["unwanted_reward"]


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_beyond_the_end_matters(loss):
    """Law 1: NaN in masked positions changes neither the loss nor a gradient."""
    agent = batches.learner("dpo", loss=loss)
    batch = next(agent.batches())
    mask = batch.mask
    assert not bool(mask.all())
    found = []
    for fill in (0.0, math.nan):
        logprob = agent.policy.evaluate(batch).logprob.detach().clone().requires_grad_()
        if batch.ref_logprob is not None:
            batch.ref_logprob = torch.where(mask, batch.ref_logprob, torch.full_like(batch.ref_logprob, fill))
        now = SimpleNamespace(logprob=torch.where(mask, logprob, torch.full_like(logprob, fill)))
        loss_now = agent.loss(batch, now, {})[0]
        loss_now.backward()
        found += [loss_now.detach(), logprob.grad]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3]) and bool(found[1].any())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_may_be_cut_and_a_run_resumed(loss):
    """Laws 8 and 10."""
    settings = {"loss": loss, "learning_rate": 1e-2, "episodes": 5, "iterations": 6}
    whole = learn(batches.learner("dpo", **settings))
    cut = learn(batches.learner("dpo", **settings, micro_batch=2))
    first = learn(batches.learner("dpo", **settings), iterations=3)
    other = batches.text_policy(batches.text_env(), seed=5)
    moved = registry.make_agent("dpo", other, data=batches.ranked(), **settings)
    moved.restore(*first.checkpoint())
    learn(moved)
    assert batches.same(batches.weights(whole.policy), batches.weights(moved.policy))
    for name, weight in batches.weights(cut.policy).items():
        torch.testing.assert_close(weight, whole.policy.state_dict()[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_only_losses_with_a_reference_compute_it(loss, monkeypatch):
    policy = batches.text_policy(batches.text_env())
    calls, plain = [], policy.evaluate
    monkeypatch.setattr(policy, "evaluate", lambda traj: calls.append(len(traj)) or plain(traj))
    agent = registry.make_agent("dpo", policy, data=batches.ranked(), loss=loss)
    free = loss in ("simpo", "orpo")
    assert bool(calls) != free and (next(agent.batches()).ref_logprob is None) == free


def test_settings_that_a_loss_does_not_read_are_refused():
    assert DPOConfig().beta == 0.1 and DPOConfig(loss="simpo").beta == 2.0 and DPOConfig(loss="orpo").beta is None
    assert set(READS) == set(LOSSES)
    for settings, said in (
        ({"loss": "orpo", "beta": 0.1}, "loss='orpo' does not read beta, which is for sigmoid, ipo"),
        ({"flip_rate": 0.1}, "loss='sigmoid' does not read flip_rate, which is for cdpo, robust"),
        ({"loss": "kto", "length_normalized": False}, "does not read length_normalized"),
        ({"loss": "robust", "flip_rate": 0.5}, "flip_rate must be .*below 0.5"),
        ({"loss": "dpo"}, "loss must be 'sigmoid', 'ipo'"),
    ):
        with pytest.raises(ValueError, match=said):
            registry.make_config("dpo", **settings)
    with pytest.raises(ValueError, match="online-dpo learns from pairs"):
        registry.make_config("online-dpo", loss="kto")
    assert typing.get_args(typing.get_type_hints(Dpo)["loss"])[0] == Loss


# KTO's data


def test_mismatched_rows_by_hand():
    data = preferences([[[1, 2, 3], [1, 2, 4, 0]], [[5, 6, 7], [5, 6, 8]]], [[0, 1], [1, 0]], 2, 2)
    found = mismatched(data)
    assert found.rank.tolist() == [0, 1, 1, 0, -1, -1, -1, -1]
    assert found.prompt.tolist() == [[1, 2], [1, 2], [5, 6], [5, 6]] * 2
    assert found.response.tolist()[4:] == [[7, -1], [8, -1], [3, -1], [4, 0]]
    picked = Labeled("kto", data).select(torch.tensor([2, 0]))
    assert picked.rank.tolist() == [1, 0, -1, -1] and picked.response.tolist()[2:] == [[3, -1], [7, -1]]


def test_labels_must_tell_something_apart():
    data = preferences([[[1, 2, 3]], [[1, 2, 4]]], [[0], [0]], 2, 2)
    with pytest.raises(ValueError, match="dpo: all 2 responses are labeled as wanted"):
        DPO(batches.text_policy(batches.text_env()), DPOConfig(loss="kto"), data)
    data.rank = torch.ones_like(data.rank)
    with pytest.raises(ValueError, match="labeled as unwanted"):
        DPO(batches.text_policy(batches.text_env()), DPOConfig(loss="kto"), data)


def test_ktos_baseline_is_of_the_whole_batch_before_the_step():
    agent = batches.learner("dpo", loss="kto", beta=0.5, learning_rate=1e-2, episodes=8, iterations=20)
    agent.iteration()
    assert agent.iteration()[1]["kl_baseline"] >= 0
    while agent.iterations_done < 20:
        batch = next(agent.batches())
        with torch.no_grad():
            other = batch.select(batch.rank < 0)
            gap = torch.where(other.mask, agent.policy.evaluate(other).logprob - other.ref_logprob, 0.0)
        expected = max(0.0, float(gap.sum(1).mean()))
        assert agent.iteration()[1]["kl_baseline"] == pytest.approx(expected, abs=1e-9)


# At rest, on the exactly solvable env


@pytest.fixture(scope="module")
def small():
    return Exact(TextVectorEnv(enumerable(tokens=2, horizon=3), 1).mdp)


def library(exact, loss, log_p, settings, flip=0.0):
    """The expected loss by the library's functions: a group for each pair, as often as it is drawn."""
    log_ref, length = exact.sequences(exact.log_ref), exact.mask.sum(dim=1)
    free, config = loss in REFERENCE_FREE, DPOConfig(loss=loss, **settings)
    x = log_p / length if free else log_p - log_ref
    total = 0.0
    for prompt in range(len(x)):
        ref, p = log_ref[prompt].exp(), wins(exact, flip)[prompt]
        for i in range(x.shape[1]):
            for j in range(x.shape[1]):
                value = PAIR_LOSSES[loss](x[prompt, [i, j]][None], PAIR, config, None)
                total = total + 2 * ref[i] * ref[j] * p[i, j] * value / len(x)
    return total


@pytest.mark.parametrize(
    ("loss", "settings", "beta", "flip"),
    [
        ("ipo", {"beta": 0.3}, 0.3, 0.0),
        ("robust", {"beta": 0.3, "flip_rate": 0.1}, 0.3, 0.1),
        ("cdpo", {"beta": 0.3, "flip_rate": 0.1}, 0.3, 0.1),
        ("simpo", {"beta": 2.0}, 2.0, 0.0),
        ("orpo", {"odds_weight": 0.5}, 0.5, 0.0),
    ],
)
def test_the_library_comes_to_rest_where_the_formulas_do(loss, settings, beta, flip):
    exact = Exact(TextVectorEnv(enumerable(tokens=2, horizon=2, prompts=1), 1).mdp)
    rest = ipo_rest(exact, beta) if loss == "ipo" else at_rest(exact, loss, beta, flip)
    for start, resting in ((rest, True), (exact.sequences(exact.log_ref), False)):
        logits = start.clone().requires_grad_()
        library(exact, loss, logits.log_softmax(dim=1), settings, flip).backward()
        assert (float(logits.grad.abs().max()) < 1e-5) == resting


def test_what_each_loss_is_worth_at_rest(small):
    """The normalized regrets of docs/algorithms.md."""
    beta = small.kl_coef
    torch.testing.assert_close(ipo_rest(small, beta), at_rest(small, "ipo", beta), rtol=0, atol=1e-3)
    cases = {
        ("sigmoid", beta, 0.0): 0.0,
        ("sigmoid", beta, 0.1): 0.0150,
        ("robust", beta, 0.1): 0.0,
        ("cdpo", beta, 0.0): 0.0150,
        ("cdpo", beta, 0.1): 0.0650,
        ("ipo", beta, 0.0): 0.4635,
        ("sigmoid-mean", beta, 0.0): 0.0121,
        ("simpo", 2.0, 0.0): 0.2710,
        ("orpo", 0.1, 0.0): 0.4898,
        ("kto", beta, 0.0): 0.0492,
    }
    for case, regret in cases.items():
        assert small.regret(at_rest(small, *case)) == pytest.approx(regret, abs=2e-4), case


def test_simpo_compares_means_over_each_responses_tokens():
    data = batches.ranked()
    assert len(set(data.response_lengths.tolist())) > 2
    agent = registry.make_agent("dpo", batches.text_policy(batches.text_env()), data=data, loss="simpo")
    rows = agent.data.select(torch.arange(len(agent.data)))
    now = agent.policy.evaluate(rows)
    means = (now.logprob * rows.mask).sum(dim=1) / rows.mask.sum(dim=1)
    each = []
    for group in rows.group.unique():
        ranks, values = rows.rank[rows.group == group], means[rows.group == group]
        pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
        each.append(torch.stack([softplus_of(1.0 - 2.0 * (values[i] - values[j])) for i, j in pairs]).mean())
    loss, _ = agent.loss(rows, now, {})
    torch.testing.assert_close(loss, torch.stack(each).mean())


def softplus_of(x):
    return torch.nn.functional.softplus(x)
