"""The pool of simulated annotators, and the share of their votes that a result reports."""

from __future__ import annotations

import numpy as np
import pytest

from lm_envs.benchmarks.measure import samples
from lm_envs.benchmarks.run.results import footnotes, shown, table
from lm_envs.feedback.annotators import Annotator, pool, votes
from lm_envs.feedback.study import Item, Response
from tests.tiny import task


def length(item: Item) -> list[float]:
    return [min(1.0, len(response.text) / 10) for response in item.responses]


def items(pairs: list[tuple[str, str]]) -> list[Item]:
    return [Item("p", (Response(a, "a"), Response(b, "b"))) for a, b in pairs]


def test_votes_without_noise_are_the_score():
    exact = Annotator(length, temperature=0.0)
    found = votes([exact], items([("aaaa", "b"), ("a", "bbbb"), ("aa", "bb")]))
    assert found.tolist()[0][:2] == [1.0, 0.0]
    flipped = votes([Annotator(length, temperature=0.0, flip=1.0)], items([("aaaa", "b"), ("a", "bbbb")]))
    assert flipped.tolist() == [[0.0, 1.0]]
    first = votes([Annotator(lambda item: [0.0, 0.0], temperature=0.0, first=1.0)], items([("a", "b")] * 400))
    assert 0.4 < first.mean() < 0.6 and set(found.tolist()[0]) <= {0.0, 0.5, 1.0}  # each stands first as often
    tied = Annotator(lambda item: [0.0, 0.0], temperature=0.0, ties=0.1)
    assert votes([tied], items([("a", "b")])).tolist() == [[0.5]]


def test_a_pool_follows_quality_with_noise_slips_and_tastes():
    better = votes(pool(length, 0), items([("a" * 9, "b")] * 100))
    by_annotator = better.mean(axis=1)
    assert better.shape == (6, 100) and np.all(by_annotator > 0.6)
    assert by_annotator[0] == by_annotator.max()  # no flips, the least noise
    again = votes(pool(length, 0), items([("a" * 9, "b")] * 100))
    assert np.array_equal(better, again)
    others = votes(pool(length, 1), items([("a" * 9, "b")] * 100))
    assert len({each.seed for seed in (0, 1) for each in pool(length, seed)}) == 12 and not np.array_equal(
        better, others
    )
    same = votes(pool(lambda item: [0.5, 0.5], 0), items([("word " * 100, "word")] * 100)).mean(axis=1)
    assert same[2] > 0.8 and same[4] < 0.4 and abs(same[0] - 0.5) < 0.2  # one likes length, one brevity, one neither


def test_the_share_of_votes_in_a_result():
    score = {"a": 1.0, "b": 0.0}

    def by_column(item: Item) -> list[float]:
        return [score[response.text] * item.columns["weight"] for response in item.responses]

    exact = (Annotator(by_column, temperature=0.0),) * 2
    columns = {split: {"weight": [1.0] * count} for split, count in (("train", 5), ("test", 2))}
    env = samples.evaluation_env(task(columns=columns, annotators=exact), "test")
    n = np.zeros(2)
    texts = [{"response": list(text), "gold": n, "proxy": n, "kl": n, "surprise": n} for text in ("ab", "ba")]
    made = [
        samples.MeasuredSamples(
            prompt=["p", "q"], finish_reason=["stop"] * 2, length=n, tokens=[[], []], seconds=0, **x
        )
        for x in texts
    ]
    found = samples.simulated(env.mdp, *made)
    assert found["votes"] == [1.0, 0.0] and found["simulated"] == 0.5 and found["simulated_se"] == 0.5
    assert samples.simulated(samples.evaluation_env(task(), "test").mdp, *made) == {}


def test_runs_of_a_process_share_the_samples_of_sft(monkeypatch: pytest.MonkeyPatch):
    drawn = []
    monkeypatch.setattr(samples, "sample_reference", lambda *given: drawn.append(given) or len(drawn))
    shared, mine = samples.ReferenceSamples(), task()
    first, same = (samples.evaluation_env(mine, "test") for _ in range(2))
    others = [samples.evaluation_env(*each) for each in ((task(), "test"), (mine, "train"))]
    found = [shared(env, None, 2, {}) for env in (first, same)]
    assert found == [1, 1]
    assert [shared(first, None, 1, {}), shared(first, None, 2, {"temperature": 2.0})] == [2, 3]
    assert [shared(env, None, 2, {"temperature": 2.0}) for env in others] == [4, 5]


@pytest.mark.parametrize("known", [True, False])
def test_the_table_shows_it_if_it_is_known(known: bool):
    row = {"task": "t", "algorithm": "a", "prompts": 2, "wins": [1.0, 0.0], "golds": [1.0, 0.0]}
    numbers = dict.fromkeys(("win_rate", "gold", "proxy", "kl", "length", "distinct_2"), 0.5)
    costs = dict.fromkeys(("tokens_generated", "reward_calls", "wall_s", "win_rate_se"), 1.0)
    votes = {"simulated": 0.75, "votes": [1.0, 0.5]} if known else {}
    lines = table([{**row, **numbers, **costs, **votes, "seed": seed} for seed in range(3)])
    assert ("simulated" in [column.name for column in shown(lines)]) is known
    if known:
        assert lines[0].estimates["simulated"].value == 0.75 and lines[0].estimates["simulated"].layers
    assert footnotes(lines)
