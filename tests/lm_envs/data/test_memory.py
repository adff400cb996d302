"""A file of 100,000 preferences is read, tokenized and learned from without holding it in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.lm_envs import byo

ROWS, BROKEN = 100_000, 50_001
WORDS = " the old cat saw a small fish and the grey cat ate a bird ."

MEASURE = """
import itertools, json, resource, sys
from pathlib import Path
import torch
from transformers import AutoTokenizer
from lm_envs.algos.engine.comparisons import Comparisons
from lm_envs.data.dataset import Examples
from lm_envs.data.packed import PackedExamples, pack
from lm_envs.data.packed import tokenise
from lm_envs.model.text import Codec
from lm_envs.training import stream

folder, on_bad = Path(sys.argv[1]), sys.argv[2]
codec = Codec(AutoTokenizer.from_pretrained(folder / "model"))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

def packed(name, **options):
    data = Examples(folder / "preferences.jsonl", **options)
    pack(tokenise(data, codec, data.rejected), folder / name, dict)
    return data

found = {}
packed("warm", max_rows=2000)
found["start"] = peak()
data = packed(on_bad, on_bad=on_bad)
found["tokenized"] = peak()
rows = PackedExamples(folder / on_bad, preferences=True)
train, held = rows.divide(0.05)
comparisons = Comparisons("test", train)
tokens = 0
for index in itertools.islice(stream(len(comparisons), 64, 0), 300):
    tokens += int(comparisons.select(torch.from_numpy(index)).mask.sum())
found["learned"] = peak()
kept = list(tokenise(Examples(folder / "preferences.jsonl", max_rows=20_000), codec, data.rejected))  # the other way
found["kept"] = peak()
found |= {"read": data.read, "rows": len(rows), "tokens": tokens, "length": int(rows.table[0, :2].sum())}
found["bad"] = [[bad.where, bad.reason] for bad in data.rejected.rows]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    byo.byte_level_bpe().save_pretrained(root / "model")
    with open(root / "preferences.jsonl", "w") as file:
        for number in range(1, ROWS + 1):
            if number == BROKEN:
                file.write('{"prompt": "cut off\n')
                continue
            prompt = f"{number}:" + WORDS * 10
            row = {"prompt": prompt, "chosen": WORDS * 10 + " fish", "rejected": WORDS * 10 + " bird"}
            file.write(json.dumps(row) + "\n")
    return root


def measure(folder, on_bad: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", MEASURE, folder, on_bad], capture_output=True, text=True)


@pytest.mark.slow
def test_memory_is_flat_and_the_broken_row_is_passed_over(folder):
    done = measure(folder, "skip")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["length"] > 280 and found["read"] == ROWS and found["rows"] == 2 * (ROWS - 1)
    assert found["bad"] == [[f"line {BROKEN}", "not JSON: Unterminated string starting at column 12"]]
    tokens = (folder / "skip" / "tokens.bin").stat().st_size / 2**20  # MiB
    assert tokens > 200
    assert found["tokenized"] - found["start"] < 24  # what it wrote is ten times that
    assert found["learned"] - found["start"] < 96  # the table of rows: six numbers each, some of them more than once
    assert found["kept"] - found["learned"] > 100  # the measure sees what does not stream


@pytest.mark.slow
def test_the_broken_row_is_fatal_where_it_is_to_be(folder):
    done = measure(folder, "raise")
    assert done.returncode == 1 and f"preferences.jsonl, line {BROKEN}: not JSON" in done.stderr
    assert not (folder / "raise" / "info.json").exists()
