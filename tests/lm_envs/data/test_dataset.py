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
from lm_envs.data.sources import fingerprint
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
    (  # a template may read any field of a message; Parquet writes those of other messages as null
        "messages",
        {"messages": [USER | {"name": "ann", "thinking": None}, SAID]},
        Example([USER | {"name": "ann"}], ([SAID],)),
    ),
    ("prompt/completion", {"prompt": "hi", "completion": " you"}, Example("hi", (" you",))),
    ("prompt/completion", {"prompt": [USER], "completion": [SAID]}, Example([USER], ([SAID],))),
    ("prompt/completion", {"prompt": [USER], "completion": "hello"}, Example([USER], ([SAID],))),
    (
        "prompt/completion/label",
        {"prompt": "hi", "completion": " you", "label": True},
        Example("hi", (" you",), label=1),
    ),
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
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return path


def bad_of(path: Path, **options) -> list[tuple[str, str]]:
    data = Examples(path, on_bad="skip", **options)
    for _ in data:
        pass
    return [(bad.where, bad.reason) for bad in data.rejected.rows]


@pytest.mark.parametrize("end", ["jsonl", "jsonl.gz", "csv", "tsv", "json", "parquet"])
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_every_convention_from_every_file(tmp_path, number, end):
    name, row, expected = ROWS[number]
    data = Examples(write(tmp_path / f"rows.{end}", [row, row]))
    found = list(data)
    assert data.convention.name == name
    assert [item for item in found] == [expected] * 2
    unit = "row" if end in ("parquet", "json") else "line"
    assert found[0].where == (f"{unit} 2" if end in ("csv", "tsv") else f"{unit} 1")
    alone = "demonstrations" if expected.label < 0 else "judgments"
    assert data.kind == ("preferences" if expected.ranks else alone if expected.completions else "prompts")


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
    with pytest.raises(ValueError, match="holds demonstrations .* and preferences are wanted: .*chosen/rejected"):
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
        (
            {"chosen": f"{HUMAN} a\n\nHuman: b\n\nAssistant: c", "rejected": f"{HUMAN} d"},
            "they answer different prompts",
        ),
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
    with pytest.raises(ValueError, match="there are no rows"):
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


# What people's files are like


@pytest.mark.parametrize(
    "written",
    [
        json.dumps([USER, SAID]),
        json.dumps([USER, SAID], indent=2),
        json.dumps(json.dumps([USER, SAID])),
        str([USER, SAID]),  # as pandas writes a list into a CSV file
        f" {json.dumps([USER, SAID])}\n",
    ],
)
@pytest.mark.parametrize("end", ["jsonl", "csv", "parquet", "folder"])
def test_messages_that_were_written_as_text_are_messages(tmp_path, written, end):
    rows = [{"messages": written}, {"messages": written}]
    path = write(tmp_path / ("train.csv" if end == "folder" else f"m.{end}"), rows)
    found = list(Examples(str(tmp_path) if end == "folder" else path))
    assert found == [Example([USER], ([SAID],))] * 2
    question = written.replace("assistant", "user")  # two of the user's
    path = write(tmp_path / "q.jsonl", [{"prompt": question, "chosen": json.dumps([SAID]), "rejected": str([OTHER])}])
    assert list(Examples(path))[0].completions == ([SAID], [OTHER])
    path = write(tmp_path / "t.jsonl", [{"prompt": json.dumps(USER), "completion": json.dumps(SAID)}])
    assert list(Examples(path)) == [Example([USER], ([SAID],))]


@pytest.mark.parametrize("end", ["csv", "tsv", "jsonl"])
def test_lists_of_objects_in_other_columns_are_objects(tmp_path, end):
    facts = [{"year": 1996}, {"year": 2003}]
    path = write(tmp_path / f"f.{end}", [{"prompt": "p", "completion": "a", "facts": facts}])
    assert [example.columns["facts"] for example in Examples(path)] == [facts]


def test_text_that_begins_like_json_stays_text(tmp_path):
    texts = [
        "[1] the cat",
        '["a", "b"]',
        '{"name": "cat"}',
        '[{"name": "cat"}]',
        "[",
        "{role}",
        '"hello" he said',
        "[[[",
    ]
    path = write(tmp_path / "t.jsonl", [{"prompt": "say it", "completion": text} for text in texts])
    assert [example.completions[0] for example in Examples(path)] == texts
    for cut in ('[{"role": "user", "content": "hi"', "[{'role': 'user', 'content': array(['hi'])}]", '{"content": "'):
        ((_, said),) = bad_of(write(tmp_path / "c.jsonl", [{"prompt": "p", "completion": cut}]))
        assert "'completion' begins like chat messages and is not JSON" in said


def test_cells_of_csv_are_texts_in_files_and_in_folders(tmp_path):
    words = ["null", "NA", "None", "nan", "000", "1.0", "true", "2020-01-01"]
    path = write(tmp_path / "train.csv", [{"prompt": f"p {word}", "completion": word} for word in words])
    for source in (path, str(tmp_path)):
        assert [example.completions[0] for example in Examples(source)] == words
    (tmp_path / "train.csv").write_text("prompt,completion\np,\n")
    ((_, said),) = bad_of(str(tmp_path))
    assert "'completion' is empty" in said


def test_what_is_labelled_false_is_not_imitated(tmp_path):
    rows = [{"prompt": f"p {i}", "completion": f" c {i}", "label": i % 3 == 0} for i in range(6)]
    for end in ("jsonl", "csv", "parquet"):
        both = list(Examples(write(tmp_path / f"k.{end}", rows)))
        assert [example.label for example in both] == [1, 0, 0, 1, 0, 0]
        data = Examples(tmp_path / f"k.{end}", "demonstrations")
        assert [example.completions[0] for example in data] == [" c 0", " c 3"]
        assert (data.read, data.unwanted, data.rejected.count) == (6, 4, 0)
        assert len(list(Examples(tmp_path / f"k.{end}", "prompts"))) == 6
    with pytest.raises(
        ValueError, match="holds judgments .* preferences are wanted.*the loss 'kto' learns from labels"
    ):
        Examples(tmp_path / "k.jsonl", "preferences")
    other = write(tmp_path / "o.jsonl", [{"prompt": "p", "completion": " c", "label": "science"}] * 2)
    with pytest.raises(ValueError, match="holds demonstrations .* and judgments are wanted: .*completion/label"):
        Examples(other, "judgments")
    assert Examples(other).convention.name == "prompt/completion" and len(list(Examples(other))) == 2
    odd = write(tmp_path / "odd.jsonl", [*rows, {"prompt": "p", "completion": " c", "label": 0.7}])
    assert bad_of(odd) == [("line 7", "'label' must be 0 or 1, or false or true, not 0.7")]


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1c"])
def test_no_letter_but_a_newline_ends_a_line(tmp_path, letter):
    rows = [{"prompt": f"a{letter}b", "completion": f" c{letter}d"}] * 2
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert list(Examples(path)) == [Example(f"a{letter}b", (f" c{letter}d",))] * 2
    for end in ("csv", "tsv"):
        assert list(Examples(write(tmp_path / f"p.{end}", rows))) == list(Examples(path))


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "completion": " b"}\n{"prompt": "a\\ud83d", "completion": " b"}\n')
    assert bad_of(path) == [("line 2", "'prompt' holds the lone surrogate '\\ud83d': correct the text")]
    path.write_text('{"prompt": [{"role": "user", "content": "\\udc00"}]}\n{"prompt": "\\ud83d\\ude00"}\n')
    assert [where for where, _ in bad_of(path)] == ["line 1"]


def test_json_over_many_lines_is_read_or_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\ufeff" + json.dumps([GOOD, GOOD, 3], indent=2))
    assert bad_of(path) == [("row 3", 'expected a JSON object, as in {"text": ...}, not 3')]
    path.write_text(json.dumps(GOOD, indent=2))
    with pytest.raises(ValueError, match=r"line 1: not JSON.*one object over many lines\? A row is an object on one"):
        Examples(path)
    path.write_text(json.dumps([GOOD, GOOD], indent=2)[:-4])
    with pytest.raises(ValueError, match=r"p.jsonl, line 10: not JSON: Expecting"):
        Examples(path)


def test_splits_of_other_names_are_listed(tmp_path):
    pytest.importorskip("datasets")
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", [{"prompt": "p", "completion": name}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train_prefs\n    path: train/*.jsonl\n  - split: test_prefs\n    path: test/*.jsonl\n---\n"
    )
    with pytest.raises(ValueError, match=f"choose a split: {tmp_path}:train_prefs, {tmp_path}:test_prefs"):
        Examples(str(tmp_path))
    assert [example.completions[0] for example in Examples(f"{tmp_path}:test_prefs")] == ["test"]


def test_a_fingerprint_is_of_contents(tmp_path):
    (tmp_path / "a").mkdir()
    path = write(tmp_path / "a" / "p.jsonl", [GOOD])
    first = fingerprint(path), fingerprint(str(tmp_path / "a"))
    copy = write(tmp_path / "q.jsonl", [GOOD])
    assert fingerprint(copy) == first[0] != first[1] != fingerprint(f"{tmp_path}/a:train")
    write(path, [GOOD | {"chosen": " c"}])  # of the same size
    assert fingerprint(path) != first[0] and fingerprint(str(tmp_path / "a")) != first[1]
