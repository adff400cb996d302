"""Over-optimisation: the fits, best-of-n over all subsets, and a whole drawing of a tiny task."""

import copy
import itertools
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from lm_envs import rng
from lm_envs.algos.best_of_n import kl_bound
from lm_envs.benchmarks import cli
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.report import overoptimization as over
from lm_envs.benchmarks.report.overoptimization import FLOOR, Curve, Settings, best_of_subsets, fit, overoptimise
from tests import tiny

TASK = "tests.algos.batches:learned_task"  # words that a count judges, and a learned reward
SMALL = Settings(
    pairs=(6, 1200),
    held_out=256,
    flip=0.0,
    iterations=4,
    prompts=2,
    samples=16,
    overrides={"learning_rate": 2e-2, "episodes": 32},
    reward_model={"steps": 120, "batch_size": 64, "learning_rate": 1e-2},
)
SMALLER = replace(SMALL, held_out=32, iterations=2, samples=4, reward_model={"steps": 4})


def test_the_fits_recover_what_made_the_points():
    kl = np.array([0.0, 0.1, 0.5, 1.0, 4.0, 9.0, 16.0])
    d = np.sqrt(kl)
    found = fit(kl, d * (2.0 - 0.3 * d), "best-of-n")
    assert found == pytest.approx({"alpha": 2.0, "beta": 0.3, "r2": 1.0})
    with np.errstate(divide="ignore", invalid="ignore"):
        gold = np.nan_to_num(d * (1.5 - 0.7 * np.log(d)))
    assert fit(kl, gold, "ppo") == pytest.approx({"alpha": 1.5, "beta": 0.7, "r2": 1.0})
    assert fit(kl, gold, "best-of-n")["r2"] < 0.99  # negative control: the other form does not fit
    assert math.isnan(fit([0.0, 0.0, 1.0], [0.0, 0.0, 1.0], "ppo")["alpha"])


def test_the_fit_ends_where_gold_first_fell_below_the_floor():
    gold = [0.0, 0.5, 0.2, FLOOR, 1.5 * FLOOR, 0.3]
    curve = Curve(500, 0.6, "ppo", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 6, gold)
    assert curve.fitted() == 4
    assert Curve(500, 0.6, "ppo", [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]).fitted() == 2


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_over_all_subsets_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 3, 5))
    expected = []
    for p, g in zip(proxy, gold, strict=True):
        subsets = [list(s) for s in itertools.combinations(range(5), n)]
        expected.append(np.mean([g[s][p[s].argmax()] for s in subsets]))
    assert best_of_subsets(proxy, gold, n) == pytest.approx(np.mean(expected))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("over")
    return overoptimise(TASK, {}, SMALL, out), out


def test_a_curve_per_reward_model_and_method(drawn):
    curves, out = drawn
    assert [(c.pairs, c.method) for c in curves] == [(6, "best-of-n"), (6, "ppo"), (1200, "best-of-n"), (1200, "ppo")]
    for curve in curves:
        assert len(curve.kl) == len(curve.proxy) == len(curve.gold) == (5 if curve.method == "best-of-n" else 4)
    assert curves[0].kl == [kl_bound(n) for n in (1, 2, 4, 8, 16)]
    found = json.loads((out / "overoptimisation.json").read_text())
    assert found["curves"][1]["gold"] == curves[1].gold and found["settings"]["pairs"] == [6, 1200]
    assert (out / "overoptimisation.png").read_bytes()[:4] == b"\x89PNG"


def test_best_of_n_starts_at_nothing_and_its_proxy_rises(drawn):
    for curve in drawn[0]:
        if curve.method == "best-of-n":
            assert curve.proxy[0] == pytest.approx(0, abs=1e-9) and curve.gold[0] == pytest.approx(0, abs=1e-9)
            assert curve.proxy == sorted(curve.proxy) and curve.proxy[-1] > 0.5


def test_a_reward_model_of_more_data_is_better_and_worth_more(drawn):
    few, _, many, _ = drawn[0]
    assert many.accuracy > few.accuracy
    assert many.gold[-1] > few.gold[-1] > -1


def test_training_begins_at_the_start_and_leaves_it(drawn):
    curve = drawn[0][3]
    assert curve.kl[0] == pytest.approx(0, abs=1e-6) and curve.kl[-1] > 0.05
    assert abs(curve.gold[0]) < 1 and curve.proxy[-1] > curve.proxy[0]


def test_the_command_draws_and_says_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "lm_envs.benchmarks.report.overoptimization.Settings", lambda **given: replace(SMALLER, pairs=given["pairs"])
    )
    cli.main(["overoptimise", "--task", TASK, "--pairs", "8", "--out", str(tmp_path / "o")])
    said = capsys.readouterr().out
    assert "8 pairs, best-of-n: gold at most" in said and (tmp_path / "o" / "overoptimisation.png").exists()


def test_the_command_tells_where_gold_was_highest(tmp_path, capsys, monkeypatch):
    fit = {"alpha": 1.0, "beta": 0.5, "r2": 0.9}
    curve = Curve(6, 0.7, "ppo", [0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 0.75, -0.5], fit)
    monkeypatch.setattr("lm_envs.benchmarks.report.overoptimization.overoptimise", lambda *given: [curve])
    cli.main(["overoptimise", "--task", TASK, "--out", str(tmp_path / "o")])
    said = "6 pairs, ppo: gold at most +0.75 at KL 1.0, -0.50 at KL 2.0, where the proxy says +2.00; alpha 1.00, beta"
    assert said in capsys.readouterr().out


def test_the_command_gives_the_tasks_source_on(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").touch()
    asked = []
    monkeypatch.setattr(
        "lm_envs.benchmarks.report.overoptimization.overoptimise", lambda *given: asked.append(given[:2]) or []
    )
    words = ["--task", "corpus", "--corpus", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "o")]
    cli.main(["overoptimise", *words])
    assert asked == [("corpus", {"path": str(tmp_path / "mine.jsonl")})]


def test_a_task_without_judge_or_learned_reward_is_refused(tmp_path):
    with pytest.raises(UserError, match="judge and a learned reward"):
        overoptimise("tests.benchmarks.fake_task:load", {}, SMALL, tmp_path)
    with pytest.raises(ValueError, match="pairs"):
        Settings(pairs=(1,))
    with pytest.raises(SystemExit):
        cli.main(["overoptimise", "--algorithm", "pp0", "--out", str(tmp_path)])


@torch.no_grad()
def kl_of(model, reference, traj) -> float:
    """``mean sum log pi - log ref`` of a batch's episodes, row by row, without padding."""
    found = []
    for prompt, response in zip(traj.prompt, traj.response, strict=True):
        head, said = prompt[prompt >= 0].tolist(), response[response >= 0].tolist()
        both = [torch.log_softmax(each(torch.tensor([head + said])).logits[0], -1) for each in (model, reference)]
        ours, theirs = (p[range(len(head) - 1, len(head + said) - 1), said].sum() for p in both)
        found.append(float(ours - theirs))
    return float(np.mean(found))


def words_of(rows) -> list[list[str]]:
    return [[tiny.WORDS[i] for i in row.tolist() if i > 0] for row in rows]


def golds_of(traj) -> np.ndarray:
    return np.array([said.count("b") - said.count("c") for said in words_of(traj.response)], dtype=float)


def proxies_of(reward, traj) -> np.ndarray:
    """Text by text: the model's logit at the last token, shifted and scaled."""
    mean, std = reward.normalise
    rows = [torch.cat([p[p >= 0], r[r >= 0]]) for p, r in zip(traj.prompt, traj.response, strict=True)]
    with torch.no_grad():
        hidden = [reward.model.transformer(row[None]).last_hidden_state[0, -1] for row in rows]
        return np.array([(float(reward.model.score(h)) - mean) / std for h in hidden])


def test_every_number_is_computed_a_second_time(tmp_path, monkeypatch):
    """From the reward models, the samples and the policies as they were, each seen where it is made."""
    judged, made, many, steps = [], [], [], []

    def watched(owner, name, keep):
        whole = getattr(owner, name)

        def call(*given, **options):
            found = whole(*given, **options)
            keep(given, options, found)
            return found

        monkeypatch.setattr(owner, name, call)

    def watch_agent(given, options, agent):
        whole = agent.iteration

        def iteration(env):
            before = copy.deepcopy(agent.policy.model)
            traj, metrics = whole(env)
            steps.append((before, agent.config, traj))
            return traj, metrics

        agent.iteration = iteration

    watched(over.judged_pairs, "judge_pairs", lambda given, options, found: judged.append((given[2:], found)))
    watched(over.judged_pairs, "make_reward_model", lambda given, options, found: made.append((given, options, found)))
    watched(over, "rollout", lambda given, options, found: many.append(found))
    watched(over, "make_agent", watch_agent)
    settings = replace(
        SMALL,
        pairs=(40, 6),
        held_out=30,
        flip=0.3,
        iterations=3,
        samples=8,
        seed=5,
        reward_model={"steps": 10, "batch_size": 8, "learning_rate": 1e-2},
    )
    curves = over.overoptimise(TASK, {}, settings, tmp_path)
    written = json.loads((tmp_path / "overoptimisation.json").read_text())
    assert [asdict(curve) for curve in curves] == written["curves"]

    (train_numbers, train), (held_numbers, held) = judged
    assert (train_numbers, held_numbers) == ((0, 40, 5), (40, 30, 5))  # none of those held out is trained on
    for each in (train, held):
        counts = [text.split().count("b") - text.split().count("c") for text in each.samples.completions]
        assert each.gold.flatten().tolist() == counts
    chances = 1 / (1 + np.exp(train.gold[:, 1] - train.gold[:, 0]))
    drawn = [rng.uniform(5, rng.ANNOTATOR, np.arange(40), k) for k in range(2)]
    chosen = (drawn[0] < chances) != (drawn[1] < 0.3)
    rewards = [reward for *_, reward in made]
    for count, ((template, texts, first, units, name), options, reward) in zip((6, 40), made, strict=True):
        assert (len(texts), name, options["seed"]) == (count, f"reward_model_{count}", 5)
        assert texts == made[1][0][1][:count] and first.tolist() == chosen[:count].tolist()
        assert template is made[0][0][0] and units == held.read_by(reward)
        scores = np.array(held.samples.score(reward))
        assert scores.mean() == pytest.approx(0, abs=1e-9) and scores.std() == pytest.approx(1)

    assert [(c.pairs, c.method) for c in curves] == [(6, "best-of-n"), (6, "ppo"), (40, "best-of-n"), (40, "ppo")]
    mean, unit = held.gold.mean(), held.gold.std()
    assert [len(each) for each in many] == [8, 8]  # of two prompts, the same for both reward models
    for k, reward in enumerate(rewards):
        best, trained = curves[2 * k : 2 * k + 2]
        differ = held.gold[:, 0] != held.gold[:, 1]
        margins = np.diff(np.array(held.samples.score(reward)).reshape(-1, 2))[:, 0]
        share = np.mean((margins < 0)[differ] == (held.gold[:, 0] > held.gold[:, 1])[differ])
        assert best.accuracy == trained.accuracy == pytest.approx(share)
        for place, n in enumerate((1, 2, 4, 8)):
            proxy, gold = [], []
            for traj in many:
                p, g = proxies_of(reward, traj), golds_of(traj)
                subsets = [list(s) for s in itertools.combinations(range(8), n)]
                proxy.append(np.mean([p[s].max() for s in subsets]) - p.mean())
                gold.append(np.mean([g[s][p[s].argmax()] for s in subsets]) - g.mean())
            assert best.kl[place] == pytest.approx(math.log(n) - (n - 1) / n)
            assert best.proxy[place] == pytest.approx(np.mean(proxy)) and best.gold[place] == pytest.approx(
                np.mean(gold) / unit
            )
        for place, (model, config, traj) in enumerate(steps[3 * k : 3 * k + 3]):
            assert config.kl_coef == 0 and config.iterations == 3 and config.seed == 5 and len(traj) == 32
            assert trained.kl[place] == pytest.approx(kl_of(model, tiny.task().reference, traj), abs=1e-6)
            assert trained.proxy[place] == pytest.approx(proxies_of(reward, traj).mean())
            assert trained.gold[place] == pytest.approx((golds_of(traj).mean() - mean) / unit)
    for curve in curves:
        assert curve.fit == pytest.approx(fit(curve.kl[: curve.fitted()], curve.gold[: curve.fitted()], curve.method))
