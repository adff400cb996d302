"""What is on disk is whole: JSON and CSV, records cut back, checkpoints that fall back when one is damaged."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from lm_envs.benchmarks.errors import UserError, explain
from lm_envs.benchmarks.run import storage
from lm_envs.benchmarks.run.storage import Checkpoints, Records, write_json, write_lines
from lm_envs.files import write_atomic


@pytest.fixture
def full_disk(monkeypatch):
    """From here on, nothing that is synced fits."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", fsync)


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError) as caught:
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
    message = explain(caught.value)
    assert "No space left" in message and str(tmp_path / "a") in message and "free some space" in message


def test_a_csv_has_the_columns_asked_for(tmp_path):
    write_lines(tmp_path / "a.csv", [{"x": 1, "y": "one, two"}, {"x": 2, "z": 3}], ["y", "x"])
    assert (tmp_path / "a.csv").read_text() == 'y,x\n"one, two",1\n,2\n'


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1.5]}


def test_records_survive_a_cut_line_and_forget_what_is_not_wanted(tmp_path):
    records = Records(tmp_path / "m.jsonl")
    records.append(*({"iteration": i, "x": i * 0.1} for i in range(5)))
    with open(records.path, "a") as file:
        file.write('{"iteration": 5, "x"')  # killed while writing
    assert [r["iteration"] for r in records.read()] == [0, 1, 2, 3, 4]
    records.keep(lambda record: record["iteration"] <= 2)
    records.append({"iteration": 3})
    assert [r["iteration"] for r in records.read()] == [0, 1, 2, 3]


def test_no_letter_but_a_newline_ends_a_record(tmp_path):
    """What JSON leaves unescaped and str.splitlines takes for the end of a line."""
    records = Records(tmp_path / "samples.jsonl")
    said = [{"iteration": i, "prompt": f"a{letter}b"} for i, letter in enumerate("\u2028\u2029\x85\r\n\x0b\x1e")]
    records.append(*said)
    assert records.read() == said
    records.keep(lambda record: record["iteration"] > 1)
    assert records.read() == said[2:]


def test_a_record_damaged_in_the_middle_is_an_error_with_its_line(tmp_path):
    records = Records(tmp_path / "m.jsonl")
    records.path.write_text('{"iteration": 0}\n{oops}\n{"iteration": 2}\n')
    with pytest.raises(UserError, match=r"m.jsonl, line 2: not JSON"):
        records.read()


def test_appending_to_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "m.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        Records(tmp_path / "m.jsonl").append({"iteration": 0})
    assert "m.jsonl" in explain(caught.value)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 2), value), "n": torch.tensor(7)}


def test_checkpoints_come_back_and_only_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    for i in (5, 10, 15):
        checkpoints.save(i, tensors(i), {"agent": {"iterations_done": i}})
    assert [path.name for path in checkpoints.paths()] == ["checkpoint-000010", "checkpoint-000015"]
    found = checkpoints.newest()
    assert found.iteration == 15 and found.state == {"agent": {"iterations_done": 15}}
    assert torch.equal(found.tensors["w"], tensors(15)["w"]) and found.tensors["n"].shape == ()


@pytest.mark.parametrize("damage", ["flip", "cut", "no state", "not json", "no tensors"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1), {})
    newest = checkpoints.save(2, tensors(2), {})
    weights, state = newest / "tensors.safetensors", newest / "state.json"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "cut":
        weights.write_bytes(data[:-8])
    elif damage == "no state":
        state.unlink()
    elif damage == "not json":
        state.write_text("{")
    else:
        weights.unlink()
    with pytest.warns(RuntimeWarning, match="checkpoint-000002 is damaged.*falling back"):
        found = checkpoints.newest()
    assert found.iteration == 1


def test_a_full_disk_keeps_the_earlier_checkpoints(tmp_path, monkeypatch, full_disk):
    with monkeypatch.context() as healthy:
        healthy.setattr(storage.os, "fsync", lambda descriptor: None)
        Checkpoints(tmp_path).save(1, tensors(1), {})
    with pytest.raises(OSError) as caught:
        Checkpoints(tmp_path).save(2, tensors(2), {})
    assert "checkpoint-000002" in explain(caught.value)
    assert os.listdir(tmp_path) == ["checkpoint-000001"]
    assert Checkpoints(tmp_path).newest().iteration == 1


def test_an_unfinished_checkpoint_is_never_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1), {})
    unfinished = tmp_path / ".tmp-checkpoint-000002"
    unfinished.mkdir()
    (unfinished / "tensors.safetensors").write_bytes(b"half")
    assert checkpoints.newest().iteration == 1
    checkpoints.save(2, tensors(2), {})
    assert not unfinished.exists()
