"""Data of the user's own: every convention from every kind of file, and what a bad row does."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from lm_envs.data.conventions import CONVENTIONS, Example, recognise
from lm_envs.data.dataset import Examples
from tests.lm_envs import byo

USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
OTHER = {"role": "assistant", "content": "what"}
HUMAN = "\n\nHuman: hi\n\nAssistant:"

# convention, a row of it, and what it says
ROWS = [
    ("prompt", {"prompt": "hi"}, Example("hi")),
    ("prompt", {"prompt": [USER]}, Example([USER])),
    ("text", {"text": "a cat"}, Example("", ("a cat",))),
    ("messages", {"messages": [USER, SAID]}, Example([USER], ([SAID],))),
    ("messages", {"messages": [USER]}, Example([USER])),
    ("prompt/completion", {"prompt": "hi", "completion": " you"}, Example("hi", (" you",))),
    ("prompt/completion", {"prompt": [USER], "completion": [SAID]}, Example([USER], ([SAID],))),
    ("prompt/completion", {"prompt": [USER], "completion": "hello"}, Example([USER], ([SAID],))),
    (
        "prompt/chosen/rejected",
        {"prompt": "hi", "chosen": " a", "rejected": " b"},
        Example("hi", (" a", " b"), (0, 1)),
    ),
    (
        "prompt/chosen/rejected",
        {"prompt": [USER], "chosen": [SAID], "rejected": [OTHER]},
        Example([USER], ([SAID], [OTHER]), (0, 1)),
    ),
    (  # chosen and rejected hold the conversation, prompt is its first message as text
        "prompt/chosen/rejected",
        {"prompt": "hi", "chosen": [USER, SAID], "rejected": [USER, OTHER]},
        Example([USER], ([SAID], [OTHER]), (0, 1)),
    ),
    (
        "chosen/rejected",
        {"chosen": [USER, SAID], "rejected": [USER, OTHER]},
        Example([USER], ([SAID], [OTHER]), (0, 1)),
    ),
    (
        "chosen/rejected",
        {"chosen": f"{HUMAN} a\n\nHuman: b\n\nAssistant: yes", "rejected": f"{HUMAN} a\n\nHuman: b\n\nAssistant: yet"},
        Example(f"{HUMAN} a\n\nHuman: b\n\nAssistant:", (" yes", " yet"), (0, 1)),
    ),
    (
        "info/summaries/choice",
        {
            "info": {"post": "a long story", "title": "it", "subreddit": "cats", "id": "t3"},
            "summaries": [{"text": " one", "policy": "sup"}, {"text": " two"}],
            "choice": 1,
        },
        Example("SUBREDDIT: r/cats\n\nTITLE: it\n\nPOST: a long story\n\nTL;DR:", (" one", " two"), (1, 0)),
    ),
    (
        "prompt/completions/ranks",
        {"prompt": "hi", "completions": [" a", " b", " c", " d"], "ranks": [3, 1, 7, 3]},
        Example("hi", (" a", " b", " c", " d"), (1, 0, 2, 1)),  # ties stay ties
    ),
]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the format that the path's end says."""
    if path.suffix == ".jsonl":
        return byo.write_jsonl(path, rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return path


def bad_of(path: Path, **options) -> list[tuple[str, str]]:
    data = Examples(path, on_bad="skip", **options)
    for _ in data:
        pass
    return [(bad.where, bad.reason) for bad in data.rejected.rows]


@pytest.mark.parametrize("end", ["jsonl", "jsonl.gz", "csv", "parquet"])
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_every_convention_from_every_file(tmp_path, number, end):
    name, row, expected = ROWS[number]
    data = Examples(write(tmp_path / f"rows.{end}", [row, row]))
    found = list(data)
    assert data.convention.name == name
    assert [item for item in found] == [expected] * 2
    unit = "row" if end == "parquet" else "line"
    assert found[0].where == (f"{unit} 2" if end == "csv" else f"{unit} 1")
    assert data.kind == ("preferences" if expected.ranks else "demonstrations" if expected.completions else "prompts")


def test_all_conventions_are_tried():
    assert {name for name, _, _ in ROWS} == {convention.name for convention in CONVENTIONS}
    assert recognise({"question": "hi"}) is None


def test_data_sets_of_a_folder_with_their_splits(tmp_path):
    """The way of the hub's data sets, without a hub."""
    pytest.importorskip("datasets")
    write(tmp_path / "train.parquet", [{"prompt": f"p {i}", "completion": " a"} for i in range(3)])
    write(tmp_path / "test.parquet", [{"prompt": "q", "completion": " b"}])
    items = list(Examples(str(tmp_path)))
    assert [(item.prompt, item.split) for item in items] == [
        *((f"p {i}", "train") for i in range(3)),
        ("q", "test"),
    ]
    assert [item.where for item in items] == ["row 1 of train", "row 2 of train", "row 3 of train", "row 1 of test"]
    assert [item.prompt for item in Examples(f"{tmp_path}:test")] == ["q"]


def test_what_is_no_data_set_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="not a data set that can be read") as caught:
        Examples(f"{tmp_path}:train")
    assert "\n" not in str(caught.value)
    for missing in ("nowhere.jsonl", "./nowhere", tmp_path / "a.csv"):
        with pytest.raises(FileNotFoundError):
            Examples(missing)


def test_preferences_serve_as_demonstrations_and_anything_as_prompts(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "hi", "completions": [" a", " b"], "ranks": [2, 1]}])
    assert [item for item in Examples(path, "demonstrations")] == [Example("hi", (" b",))]
    assert [item for item in Examples(path, "prompts")] == [Example("hi")]
    path = write(tmp_path / "m.jsonl", [{"messages": [USER, SAID]}])
    assert [item for item in Examples(path, "prompts")] == [Example([USER])]
    with pytest.raises(ValueError, match="holds demonstrations .messages., and preferences are wanted"):
        Examples(path, "preferences")


GOOD = {"prompt": "p", "chosen": " a", "rejected": " b"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 20_000, "not JSON that can be read"),
        ('{"n": ' + "1" * 5000 + "}", "not JSON that can be read"),
        ("\udce9", "not UTF-8"),
        (json.dumps({"prompt": "p", "chosen": " a"}), "there is no 'rejected'"),
        (json.dumps(GOOD | {"rejected": None}), "'rejected' must be a string, not None"),
        (json.dumps(GOOD | {"rejected": 3}), "'rejected' must be a string, not 3"),
        (json.dumps(GOOD | {"chosen": " "}), "'chosen' is empty"),
        (json.dumps(GOOD | {"prompt": ""}), "the prompt is empty"),
        (json.dumps(GOOD | {"rejected": " a"}), "the same text"),
        (json.dumps(GOOD | {"chosen": [USER]}), "must end in a message that is not the assistant's"),
        (json.dumps(GOOD | {"chosen": [SAID, SAID]}), "one message of the assistant's"),
        (json.dumps(GOOD | {"chosen": []}), "list of messages"),
        (json.dumps(GOOD | {"chosen": [{"role": "assistant"}]}), "'content' must be a string"),
        (json.dumps(GOOD | {"split": "train"}), "unlike before"),
    ],
)
def test_a_bad_row_is_fatal_or_passed_over_by_its_line(tmp_path, bad, reason):
    path = tmp_path / "p.jsonl"
    lines = [json.dumps(GOOD), "", bad, json.dumps(GOOD)]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape") + b"\n")
    data = Examples(path, on_bad="skip")
    assert [item.where for item in data] == ["line 1", "line 4"]
    assert (data.read, data.rejected.count) == (3, 1)
    assert data.rejected.rows[0].where == "line 3" and reason in data.rejected.rows[0].reason
    read = []
    with pytest.raises(ValueError, match=f"{path}, line 3: ") as caught:
        read.extend(Examples(path))
    assert reason in str(caught.value)
    assert list(data) and data.rejected.count == 1  # another pass counts anew


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "hello", "rejected": "what"}, "whole dialogues"),
        ({"chosen": f"{HUMAN} a", "rejected": f"{HUMAN} a"}, "the same text"),
        ({"chosen": f"{HUMAN} a\n\nHuman: b\n\nAssistant: c", "rejected": f"{HUMAN} d"}, "do not answer one prompt"),
        ({"prompt": "p", "completions": [" a"], "ranks": [1]}, "at least two texts"),
        ({"prompt": "p", "completions": [" a", " b"], "ranks": [1]}, "2 whole numbers"),
        ({"prompt": "p", "completions": [" a", " b"], "ranks": [1, True]}, "2 whole numbers"),
        ({"prompt": "p", "completions": [" a", " b"], "ranks": [1, 1]}, "nothing is preferred"),
        ({"info": {"post": "x"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}, "'choice' must be"),
        ({"info": {}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}, "'info.post' must be a string"),
        ({"info": {"post": "x"}, "summaries": [{"text": "a"}, {}], "choice": 0}, "'summaries[1].text'"),
        ({"messages": [SAID]}, "before its last"),
        ({"messages": "hi"}, "list of messages"),
        ({"prompt": [USER, SAID]}, "ends in a message of the assistant's"),
    ],
)
def test_rows_that_break_their_convention(tmp_path, row, reason):
    assert [where for where, said in bad_of(write(tmp_path / "a.jsonl", [row])) if reason in said] == ["line 1"]


def test_bad_rows_of_csv_and_parquet(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'prompt,completion\n"two\nlines",a\np\np,"b\n",c\nq,\xe9\nr,  \n"open,d\n'  # 2-3 good, 4, 5-6, 7, 8, 9
    )
    found = bad_of(path)
    assert [where for where, _ in found] == ["line 4", "line 5", "line 7", "line 8", "line 9"]
    for (_, said), reason in zip(
        found, ("1 cells under 2", "3 cells", "not UTF-8", "is empty", "not CSV"), strict=True
    ):
        assert reason in said
    (tmp_path / "b.csv").write_text("messages\nhello\n")
    assert bad_of(write(tmp_path / "c.csv", [{"messages": [USER, SAID]}, {"messages": "no JSON"}]))[0][0] == "line 3"
    with pytest.raises(ValueError, match=r"b.csv, line 2: 'messages' must be a list of messages, not 'hello'"):
        list(Examples(tmp_path / "b.csv"))
    (tmp_path / "d.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ValueError, match=r"d.csv, line 1: a CSV file begins with the names"):
        Examples(tmp_path / "d.csv")
    rows = [{"prompt": "p"}, {"prompt": None}, {"prompt": "q"}]
    assert bad_of(write(tmp_path / "a.parquet", rows)) == [("row 2", "'prompt' must be a string, not None")]


def test_files_that_are_broken_as_a_whole(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"a.parquet: not a Parquet file"):
        Examples(tmp_path / "a.parquet")
    whole = gzip.compress(b"".join(json.dumps({"prompt": f"{i * 7919}"}).encode() + b"\n" for i in range(5000)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"damaged gzip data after line \d\d+"):
        list(Examples(tmp_path / "a.jsonl.gz"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="not one row"):
        Examples(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"line 1: the columns 'question' are in no known convention: prompt/comp"):
        Examples(write(tmp_path / "strange.jsonl", [{"question": "?"}]))
    with pytest.raises(ValueError, match="on_bad must be"):
        Examples(tmp_path / "strange.jsonl", on_bad="ignore")


def test_a_first_row_that_is_broken_decides_nothing(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "x"}\n{\n' + (json.dumps(GOOD) + "\n") * 3)
    data = Examples(path, on_bad="skip")
    assert data.convention.name == "prompt/chosen/rejected" and len(list(data)) == 3
    assert [bad.where for bad in data.rejected.rows] == ["line 1", "line 2"]


def test_rows_are_read_in_a_stream(tmp_path):
    """The first is there before the last is looked at."""
    path = tmp_path / "p.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") * 500 + "{\n")
    stream = iter(Examples(path))
    assert next(stream).where == "line 1"
    with pytest.raises(ValueError, match="line 501"):
        list(stream)
    assert len(list(Examples(path, max_rows=400))) == 400
