"""Sentences with given words: forms and rewards by hand, what ships, and the user's rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lm_envs.tasks import concepts, prompted
from tests.lm_envs import byo


@pytest.mark.parametrize(
    ("concept", "has", "lacks"),
    [
        ("run", ["She RAN.", "running", "runner"], ["ruin", "rung"]),
        ("ride", ["riding", "rode", "a rider"], ["rid"]),
        ("carry", ["carries", "carried", "carrying"], ["car"]),
        ("leaf", ["leaves", "leaf's"], ["leave"]),
        ("knife", ["knives"], ["knit"]),
        ("box", ["boxes", "boxed"], ["boxxed"]),
        ("child", ["children"], ["chill"]),
    ],
)
def test_forms_by_hand(concept, has, lacks):
    assert all(concepts.covers(text, concept) for text in has)
    assert not any(concepts.covers(text, concept) for text in lacks)


def test_coverage_times_fluency_by_hand():
    class Known:
        def mean(self, texts):
            return np.array([-2.0, -12.0, np.nan])

    texts, words = ["A dog runs.", "The dog sat.", "dog"], [["dog", "run"], ["dog", "run"], ["dog"]]
    assert concepts.coverage(texts, words) == [1.0, 0.5, 1.0]
    assert concepts.CoveredAndFluent(Known())(texts, words) == pytest.approx([0.8, 0.0, 0.0])


def test_what_ships():
    rows = prompted.read(prompted.SHIPPED / "concepts.jsonl", concepts._row)
    assert Counter(row["split"] for row in rows) == {"train": 112, "validation": 24, "test": 104}
    assert len({tuple(sorted(row["concepts"])) for row in rows}) == 240
    for row in rows:  # each reference is a solution
        assert concepts.coverage(row["reference"], [row["concepts"]] * 2) == [1.0, 1.0]


def test_rows_of_commongen(tmp_path: Path):
    row = {"concepts": ["cat", "sit", "mat"], "target": "A cat sat on a mat."}
    made = concepts._row(row)
    assert made["prompt"] == "Write one short sentence with the words cat, sit and mat."
    assert made["reference"] == ["A cat sat on a mat."] and concepts._row({**row, "reference": ["a", "b"]})[
        "reference"
    ] == ["a", "b"]
    path = byo.write_jsonl(tmp_path / "f.jsonl", [{"concepts": ["cat"]}])
    with pytest.raises(ValueError, match="line 1: 'reference' must be a sentence"):
        prompted.read(path, concepts._row)
