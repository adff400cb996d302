"""``lm-envs data check``: what it counts, what it lists, and its exit status."""

from __future__ import annotations

import json
import math
import re

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.commands.data_check import check
from tests.lm_envs import byo

GOOD = {"prompt": "the cat", "chosen": " hid", "rejected": " saw"}


def shown(capsys, *arguments: object) -> tuple[int, str]:
    """Exit status and what was printed, with each run of blanks as one."""
    status = 0
    try:
        main(["data", "check", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    found = capsys.readouterr()
    return status, re.sub(r" +", " ", found.out + found.err)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [
        GOOD,
        GOOD | {"chosen": " hid a fish", "extra": 1},
        GOOD,  # again
        GOOD | {"rejected": " hid"},
        GOOD | {"chosen": ""},
        GOOD | {"prompt": "the " + "cat " * 30},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    return path


def test_it_says_what_a_file_holds(file, capsys):
    status, text = shown(capsys, file)
    assert status == 0
    assert "holds preferences, in the convention prompt/chosen/rejected" in text
    assert "columns prompt, chosen, rejected\n" in text.replace(" \n", "\n")
    assert "rows 7, of them 4 usable (57.1 %), 3 bad" in text and "prompts 2 different" in text
    assert "duplicates 1 rows say what an earlier one did: line 3 as line 1" in text
    assert "characters min median 95 % 99 % max mean" in text
    assert "prompt 7 7 124 124 124 36" in text  # by hand: 7, 7, 7 and 124 characters, twice each
    assert "completion 4 4 11 11 11 5" in text  # 4 4 4 11 4 4 4 4
    assert "bad rows: 1 chosen and rejected alike, 1 empty, 1 not JSON" in text
    for line in (" line 4: the preferred", " line 5: 'chosen' is empty", " line 7: not JSON: Expecting property name"):
        assert line in text


def test_labels_repeats_and_lengths_are_counted(tmp_path, capsys):
    """Twenty judgments of each answer to a prompt: the same with another label says something else."""
    rows = [{"prompt": "p" * (k + 1), "completion": "y" * (1 + k**2), "label": k % 4 > 0} for k in range(20)]
    rows += [rows[2] | {"label": not rows[2]["label"]}, rows[5]]
    path = byo.write_jsonl(tmp_path / "j.jsonl", rows)
    text = shown(capsys, path)[1]
    assert "labels 16 true and 6 false" in text and "duplicates 1 rows say what an earlier one did: line 22" in text
    prompts = sorted(len(row["prompt"]) for row in rows)
    together = sorted(len(row["prompt"]) + len(row["completion"]) for row in rows)
    for name, lengths in (("prompt", prompts), ("together", together)):
        # of 22, the least that is at or above each share
        marks = [lengths[math.ceil(share * 21)] for share in (0, 0.5, 0.95, 0.99, 1)]
        assert f"{name} {' '.join(map(str, marks))} {sum(lengths) / 22:.0f}" in text


def test_lengths_are_the_tokenizers(file, tmp_path, capsys):
    tokenizer = byo.byte_level_bpe()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    found = check(file, tokenizer)
    ids = [tokenizer(text)["input_ids"] for text in ("the cat", "the cat hid", "the cat saw")]
    assert found.unit == "tokens" and found.lengths["prompt"][0] == len(ids[0])
    assert list(found.lengths["together"][:2]) == [len(ids[1]) + 1, len(ids[2]) + 1]  # with the EOS
    status, text = shown(capsys, file, "--tokenizer", tmp_path / "tokenizer", "--max-length", 20)
    assert status == 0 and "3 usable" in text and "1 too long" in text and "line 6: " in text
    assert check(file, tokenizer, kind="prompts").lengths["prompt"][0] == len(ids[0])


def test_the_first_bad_rows_are_listed_and_all_on_request(tmp_path, capsys):
    path = byo.write_jsonl(tmp_path / "p.jsonl", [GOOD, *({"prompt": "x", "chosen": "", "rejected": "a"},) * 25])
    text = shown(capsys, path)[1]
    assert " line 11: 'chosen' is empty" in text and " line 12:" not in text
    assert "... and 15 more (--all-bad lists them)" in text and "25 bad" in text
    text = shown(capsys, path, "--all-bad")[1]
    assert " line 26: 'chosen' is empty" in text and "more" not in text


def test_exit_status(tmp_path, file, capsys):
    assert shown(capsys, file, "--max-rows", 1)[0] == 0
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD | {"rejected": " hid"}) + "\n")
    status, text = shown(capsys, path)
    assert status == 1 and "0 usable" in text and "line 1: the preferred completion" in text
    path.write_text('{"question": 1}\n')
    status, text = shown(capsys, path)
    assert status == 1 and "in no known convention" in text and "Traceback" not in text
    assert shown(capsys, tmp_path / "none.jsonl")[0] == 1
    assert shown(capsys, file, "--max-length", 5) == (1, "lm-envs: --max-length counts tokens: give --tokenizer too\n")
    status, text = shown(capsys, file, "--use", "preferences", "--max-rows", 2)
    assert status == 0 and "2 usable" in text


def test_messages_need_a_template(tmp_path, capsys):
    path = byo.write_jsonl(tmp_path / "m.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    assert "holds prompts, in the convention messages" in shown(capsys, path)[1]
    byo.byte_level_bpe().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    status, text = shown(capsys, path, "--tokenizer", tmp_path / "tokenizer")
    assert status == 1 and "no chat template" in text and "Traceback" not in text
