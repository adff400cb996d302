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


def test_records_go_back_to_where_a_checkpoint_saw_them(tmp_path):
    records = Records(tmp_path / "m.jsonl")
    assert records.begins(*records.seal())
    records.append(*({"iteration": i, "x": i * 0.1} for i in range(3)))
    size, sha = records.seal()
    records.append({"iteration": 3}, {"iteration": 4})
    with open(records.path, "a") as file:
        file.write('{"iteration": 5, "x"')  # killed while writing
    assert [r["iteration"] for r in records.read()] == [0, 1, 2, 3, 4]
    assert records.begins(size, sha) and not records.begins(size - 1, sha) and not records.begins(size + 1, sha)
    records.cut(size)
    records.append({"iteration": 3})
    assert [r["iteration"] for r in records.read()] == [0, 1, 2, 3]
    records.cut(0)
    assert records.read() == []
    records.path.mkdir()
    assert not records.begins(size, sha)
    with pytest.raises(UserError, match="m.jsonl cannot be read: Is a directory"):
        records.read()


def test_no_letter_but_a_newline_ends_a_record(tmp_path):
    """What JSON leaves unescaped and str.splitlines takes for the end of a line."""
    records = Records(tmp_path / "samples.jsonl")
    said = [{"iteration": i, "prompt": f"a{letter}b"} for i, letter in enumerate("\u2028\u2029\x85\r\n\x0b\x1e")]
    records.append(*said)
    assert records.read() == said


def test_a_sealed_file_is_refused_once_it_is_changed(tmp_path):
    path = tmp_path / "config.json"
    wrote = storage.write_sealed(path, {"a": [1, 2.5, None], "b": {"c": "é"}, "d": float("nan")})
    assert storage.read_sealed(path) == wrote and wrote["d"] is None
    text = path.read_text()
    for changed in (
        text.replace("2.5", "2.6"),
        text.replace('"c"', '"k"'),
        text.replace("sha256", "sha257"),
        "[1]",
        "",
    ):
        path.write_text(changed)
        with pytest.raises(UserError, match="config.json (was changed|is damaged).*restore it"):
            storage.read_sealed(path)


def test_a_record_damaged_in_the_middle_is_an_error_with_its_line(tmp_path):
    records = Records(tmp_path / "m.jsonl")
    records.path.write_text('{"iteration": 0}\n{oops}\n{"iteration": 2}\n')
    with pytest.raises(UserError, match=r"m.jsonl, line 2: not JSON"):
        records.read()


def test_an_error_of_the_writer_of_tensors_is_the_systems(tmp_path, monkeypatch):
    save, kept = storage.safetensors.save_file, Checkpoints(tmp_path)
    kept.save(1, tensors(1), {})
    monkeypatch.setattr(storage.safetensors, "save_file", lambda held, file: save(held, file.parent / "gone" / "x"))
    with pytest.raises(FileNotFoundError) as caught:
        kept.save(2, tensors(2), {})
    assert caught.value.filename == str(tmp_path / "checkpoint-000002")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


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


@pytest.mark.parametrize("damage", ["flip", "cut", "no state", "not json", "no tensors", "state", "manifest"])
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
    elif damage == "state":
        state.write_text('{"agent": 1}\n')
    elif damage == "manifest":
        (newest / "manifest.json").unlink()
    else:
        weights.unlink()
    with pytest.warns(RuntimeWarning, match="checkpoint-000002 is damaged.*falling back"):
        found = checkpoints.newest()
    assert found.iteration == 1


def test_a_checkpoint_of_another_run_or_iteration_is_not_used(tmp_path):
    mine, other = Checkpoints(tmp_path / "mine", ("a",)), Checkpoints(tmp_path / "other", ("b",))
    mine.save(1, tensors(1), {})
    (tmp_path / "mine/checkpoint-000003").symlink_to(other.save(3, tensors(3), {}))
    (tmp_path / "mine/checkpoint-000002").symlink_to(tmp_path / "mine/checkpoint-000001")
    with pytest.warns(RuntimeWarning, match="of another run"):
        assert mine.newest().iteration == 1


def test_a_checkpoint_is_not_used_with_records_that_were_changed(tmp_path):
    records, checkpoints = Records(tmp_path / "m.jsonl"), Checkpoints(tmp_path / "c")
    for i in (1, 2):
        records.append({"iteration": i})
        checkpoints.save(i, tensors(i), {"records": {"m.jsonl": records.seal()}})
    lines = records.path.read_text()
    records.path.write_text(lines.replace("2", "3"))
    with pytest.warns(RuntimeWarning, match="m.jsonl was changed before checkpoint-000002"):
        assert checkpoints.newest([records]).iteration == 1
    records.path.write_text(lines.replace("1", "3"))
    with pytest.warns(RuntimeWarning), pytest.raises(UserError, match="m.jsonl was changed.*no checkpoint.*restore it"):
        checkpoints.newest([records])


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
    assert checkpoints.newest().iteration == 1 and len(checkpoints.paths()) == 1
