"""Whatever a file holds, reading it ends in rows or in one line that names the file: never in another exception."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lm_envs.benchmarks.commands.data_check import check
from lm_envs.data.conventions import CONVENTIONS
from lm_envs.data.dataset import Examples, Rejected
from lm_envs.data.packed import PackedExamples, pack, tokenise
from lm_envs.data.sources import FILES
from lm_envs.model.text import Codec
from tests.lm_envs import byo
from tests.lm_envs.model.test_text import TURNS

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
NAMES = sorted({name for convention in CONVENTIONS for name in convention.columns} | {"label", "split", "reference"})
LETTERS = st.text(st.characters() | st.sampled_from("\x00\u2028\ud800\r\n\"',[{ "), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | LETTERS | st.sampled_from(["train", "[]", "{", "1"])
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", None]), "content": LETTERS | SCALARS})
VALUES = st.recursive(
    SCALARS | TURN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=2),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES | st.just("the cat"), max_size=5), max_size=4)
CELLS = st.lists(st.lists(st.sampled_from(NAMES) | LETTERS, max_size=4), max_size=4)


def tokenizer():
    made = byo.byte_level_bpe()
    made.chat_template = TURNS
    return made


CODEC = Codec(tokenizer())
ENDS = [*FILES, ".jsonl.gz"]


def lines(rows: list[dict], end: str) -> bytes:
    text = json.dumps(rows) if end == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")


def table(cells: list[list[str]], delimiter: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(cells)
    return out.getvalue().encode("utf-8", "surrogatepass")


def read_all(content: bytes, end: str) -> None:
    """As every reader does, bad rows fatal and passed over."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"mine{end}"
        path.write_bytes(content)
        for kind in (None, "prompts", "demonstrations", "preferences", "labelled", "parallel"):
            refused(path, lambda kind=kind: check(path, kind=kind))
            refused(path, lambda kind=kind: list(Examples(path, kind)))
        for number, (kind, reward) in enumerate(
            [("demonstrations", None), ("preferences", None), ("preferences", True)]
        ):
            out = Path(folder) / str(number)
            refused(path, lambda kind=kind, reward=reward, out=out: packed(path, kind, reward, out))


def packed(path: Path, kind: str, reward: bool | None, out: Path) -> None:
    """As sft, dpo and reward-model."""
    data = Examples(path, kind, "skip")
    pack(tokenise(data, CODEC, data.rejected, 1000, reward), out, dict)
    found = PackedExamples(out, kind == "preferences")
    assert all(len(ids) for row in range(len(found)) for ids in found.read(row)[1:])


def refused(path: Path, read) -> None:
    try:
        read()
    except ValueError as error:
        assert type(error) is ValueError and str(error).startswith(str(path)) and "\n" not in str(error)
        str(error).encode()  # it can be written


@QUICK
@given(st.binary(max_size=60), st.sampled_from(ENDS))
@example(b"", ".csv")
@example(b"\xff\xfe{\x00", ".jsonl")
@example(gzip.compress(b"prompt,completion\na,b\n")[:-9], ".csv")
@example(b"[" * 100_000, ".json")
@example(b'{"prompt": ' + b"9" * 5000 + b"}", ".jsonl")
@example(b"prompt;completion\na;b\n", ".csv")
def test_bytes(content, end):
    read_all(content, end)


@QUICK
@given(ROWS, st.sampled_from([".jsonl", ".json", ".ndjson", ".jsonl.gz"]), st.data())
@example([{"prompt": "a", "completion": "b", "split": ["train"]}], ".jsonl", None)
def test_rows(rows, end, data):
    content = lines(rows, end)
    if data is not None and data.draw(st.booleans()):  # one byte is another one
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        content = content[:place] + data.draw(st.binary(max_size=2)) + content[place + 1 :]
    read_all(content, end)


@QUICK
@given(CELLS, st.sampled_from([(".csv", ","), (".tsv", "\t"), (".csv", ";")]))
@example([["prompt", " completion"], ["a", "b"]], (".csv", ","))
@example([["prompt", "a\nb"], ["a"]], (".csv", ","))
def test_tables(cells, end):
    read_all(table(cells, end[1]), end[0])


@pytest.mark.parametrize(
    ("content", "end", "said"),
    [
        (b"prompt;completion\na;b\n", ".csv", "line 1: one column, 'prompt;completion'.* ';'"),
        ("prompt,completion\n".encode("utf-16"), ".csv", "line 1: this is text in UTF-16: save it as UTF-8"),
        (b"PK\x03\x04....", ".jsonl", "line 1: this is a ZIP archive"),
        (b'{"prompt": "a"}\r{"prompt": "b"}\r', ".jsonl", "line 1: .* not in a carriage return alone"),
        (b'{"prompt": "a", "prompt": "b"}\n', ".jsonl", "line 1: .*the name 'prompt' occurs twice"),
        (gzip.compress(b"prompt,completion\na,b\n")[:-9], ".csv.gz", "damaged gzip data after line 2"),
    ],
    ids=["semicolons", "utf-16", "zip", "carriage returns", "a name twice", "cut gzip"],
)
def test_files_as_people_have_them(tmp_path, content, end, said):
    path = tmp_path / f"mine{end}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}.*{said}"):
        list(Examples(path))


def test_gzip_is_known_by_its_content_and_names_of_columns_lose_their_spaces(tmp_path):
    text = b"prompt, completion\nthe cat,sat\n"
    for name, content in [("a.csv", gzip.compress(text)), ("b.csv.gz", text)]:
        (tmp_path / name).write_bytes(content)
        (found,) = Examples(tmp_path / name)
        assert (found.prompt, found.completions) == ("the cat", ("sat",))


def test_a_split_that_is_a_list_is_a_bad_row(tmp_path):
    path = byo.write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "split": ["train"]}])
    data = Examples(path, on_bad="skip")
    assert (
        not list(data)
        and isinstance(data.rejected, Rejected)
        and "'split' must be one of" in data.rejected.rows[0].reason
    )
