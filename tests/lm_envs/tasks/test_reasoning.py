"""Questions with one right answer: extraction and scores by hand, generators by a stand-in of reasoning-gym."""

from __future__ import annotations

import re
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest

from lm_envs.tasks import load, prompted, reasoning
from tests.lm_envs import byo


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("<answer> 12 </answer> or <answer>13</answer>", "13"),
        ("So \\boxed{42}.", "42"),
        ("Answer: 5 apples\nI think", "5 apples"),
        ("The answer is **blue**.", "blue"),
        ("First 3, then 1,250.5 dollars.", "1,250.5"),
        ("no number\nred", "red"),
        ("", ""),
    ],
)
def test_answers_are_found(text, answer):
    assert reasoning.answer_of(text) == answer


def test_scores_by_hand():
    texts = ["Answer: $1,250", "It is 7 of 8.", "Answer: Blue.", "#### -3", "", [{"content": "Answer: 2.0 kg"}]]
    right = ["1250", "7", "blue", "3", "0", "2"]
    assert reasoning.verified(texts, right) == reasoning.solved(texts, right) == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def test_what_ships():
    rows = prompted.read(prompted.SHIPPED / "reasoning.jsonl", reasoning._row)
    assert Counter(row["split"] for row in rows) == {"train": 192, "validation": 16, "test": 112}
    assert all(re.fullmatch(r"\d+", row["answer"]) for row in rows) and len({row["prompt"] for row in rows}) == 320


def test_each_worked_answer_is_right():
    """Every "a * b = c" in a worked answer holds, and the last result is the answer."""
    for where, row in prompted.read_rows(prompted.SHIPPED / "reasoning.jsonl"):
        sums = re.findall(r"([\d+*/ -]*\d [+*/-] [\d+*/ -]*\d) = (\d+)", row["answer"])
        assert sums and all(eval(left) == int(right) for left, right in sums), where
        assert sums[-1][1] == row["answer"].rpartition("####")[2].strip(), where


class Sums:
    """A generator of sums, of ``different`` numbers, whose verifier gives part of the points for a number at all."""

    def __init__(self, size: int, seed: int, max_terms: int = 2, different: int = 1000) -> None:
        if max_terms < 2:
            raise AssertionError("max_terms must be at least 2")
        self.size, self.terms, self.different = size, max_terms, different

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict:
        term = i % self.different
        return {"question": "Sum: " + " + ".join([str(term)] * self.terms), "answer": str(term * self.terms)}

    def score_answer(self, answer: str, entry: dict) -> float:
        return 1.0 if answer == entry["answer"] else 0.1 * answer.isdigit()


@pytest.fixture
def gym(monkeypatch):
    made = ModuleType("reasoning_gym")
    made.create_dataset = lambda name, **settings: Sums(**settings)
    monkeypatch.setitem(sys.modules, "reasoning_gym", made)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", SimpleNamespace(DATASETS={"chain_sum": Sums}))
    reasoning._generator.cache_clear()
    yield
    reasoning._generator.cache_clear()


def test_generated_questions_and_their_verifier(gym):
    rows = reasoning.generated("chain_sum", {"size": 20, "seed": 0, "max_terms": 3})
    assert Counter(row["split"] for row in rows) == {"train": 14, "validation": 2, "test": 4}
    assert rows[4]["prompt"].startswith("Sum: 4 + 4 + 4\n") and rows[4]["answer"] == "12"
    columns = {"answer": ["12"] * 3, "verify": [rows[4]["verify"]] * 3}
    assert reasoning.verified(["Answer: 12", "Answer: 11", "Answer: so"], **columns) == [1.0, 0.1, 0.0]
    assert reasoning.solved(["Answer: 12", "Answer: 11", "Answer: so"], **columns) == [1.0, 0.0, 0.0]


def test_a_question_that_comes_again_counts_once(gym):
    rows = reasoning.generated("chain_sum", {"size": 200, "seed": 0, "different": 20})
    assert len({row["prompt"] for row in rows}) == len(rows) == 20
    assert Counter(row["split"] for row in rows) == {"train": 14, "validation": 2, "test": 4}
    assert (
        reasoning.verified([f"Answer: {row['answer']}" for row in rows], [""] * 20, [r["verify"] for r in rows])
        == [1.0] * 20
    )


def test_bad_settings_are_told(gym, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'chain_sum'"):
        load("reasoning:chain_sums")
    with pytest.raises(ValueError, match="reasoning:chain_sum: its settings: max_terms must be at least 2"):
        load("reasoning:chain_sum?max_terms=1")
    with pytest.raises(ValueError, match="its settings: .*unexpected keyword argument 'terms'"):
        load("reasoning:chain_sum?terms=1")
    with pytest.raises(ValueError, match="no option 'max_terms' without a dataset"):
        load("reasoning?max_terms=1")
    with pytest.raises(ValueError, match="not both"):
        load("reasoning:chain_sum?path=x")
    path = byo.write_jsonl(tmp_path / "f.jsonl", [{"question": "q", "answer": "12"}])
    with pytest.raises(ValueError, match="line 1: 'answer' must end in '####'"):
        load("reasoning", path=str(path))


def test_the_package_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    reasoning._generator.cache_clear()
    with pytest.raises(ImportError, match=re.escape("pip install 'lm-envs[reasoning]'")):
        load("reasoning:chain_sum")


@pytest.mark.slow
def test_with_the_package():
    pytest.importorskip("reasoning_gym")
    rows = reasoning.generated("chain_sum", {"size": 20, "seed": 0, "max_terms": 3})
    assert all(reasoning.verified([f"Answer: {row['answer']}"], [""], [row["verify"]]) == [1.0] for row in rows)
