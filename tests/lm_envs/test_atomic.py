"""Files are replaced whole or not at all."""

from __future__ import annotations

import os

import pytest

from lm_envs.atomic import replacing, write_atomic


def test_a_file_is_replaced_whole_and_nothing_is_left_behind(tmp_path):
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "a", "new, später")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "new, später"
    write_atomic(tmp_path / "a", b"\x00")
    assert (tmp_path / "a").read_bytes() == b"\x00" and os.listdir(tmp_path) == ["a"]


def test_the_old_content_stays_until_all_is_written(tmp_path):
    path = tmp_path / "folder" / "a"
    write_atomic(path, "old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("nan"), KeyboardInterrupt()])
def test_what_fails_halfway_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)
