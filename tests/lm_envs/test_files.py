"""Files are replaced whole or not at all; cache keys, whole entries, and what is said where none can be written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm_envs import files
from lm_envs.benchmarks.errors import explain
from lm_envs.files import replacing, write_atomic


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LM_ENVS_CACHE", str(folder))
    return folder


class Builder:
    """Writes one file, and counts how often it was asked to."""

    def __init__(self, text="made"):
        self.text, self.calls = text, 0

    def __call__(self, folder):
        self.calls += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "content.txt").write_text(self.text)


def content(entry: Path) -> str:
    return (entry / "sub" / "content.txt").read_text()


def test_the_root_is_the_variable_else_the_users_cache(monkeypatch, tmp_path, root):
    assert files.cache_root() == root
    monkeypatch.delenv("LM_ENVS_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_root() == tmp_path / "xdg" / "lm-envs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_root() == Path.home() / ".cache" / "lm-envs"


def test_an_entry_is_built_once_per_content_of_its_key():
    build = Builder()
    first = files.cached("things", {"a": 1, "b": [2]}, build)
    assert content(first) == "made" and build.calls == 1
    assert files.cached("things", {"b": [2], "a": 1}, build) == first and build.calls == 1
    others = [
        files.cached("things", {"a": 1, "b": [3]}, build),
        files.cached("things", {"a": "1", "b": [2]}, build),
        files.cached("others", {"a": 1, "b": [2]}, build),
    ]
    assert len({first, *others}) == 4 and build.calls == 4


def test_the_code_hash_sees_content_and_order_of_files(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("x = 1\n")
    two.write_text("y = 1\n")
    before = files.code_hash([one, two])
    assert before == files.code_hash([one, two])
    one.write_text("x = 2\n")
    assert files.code_hash([one, two]) != before


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "no manifest"])
def test_a_damaged_entry_is_made_again(damage, caplog):
    build = Builder()
    entry = files.cached("things", {}, build)
    victim = entry / "sub" / "content.txt"
    if damage == "flip":
        victim.write_text("mode")  # the same size
    elif damage == "cut":
        victim.write_text("ma")
    elif damage == "remove":
        victim.unlink()
    elif damage == "manifest":
        (entry / files.MANIFEST).write_text('{"files": ')
    else:
        (entry / files.MANIFEST).unlink()
    assert files.damaged(entry) is not None
    assert files.cached("things", {}, build) == entry
    assert content(entry) == "made" and build.calls == 2
    assert "damaged" in caplog.text


def test_a_build_that_fails_leaves_nothing(root):
    def build(folder):
        Builder()(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.cached("things", {}, build)
    assert [path.suffix for path in (root / "things").iterdir()] == [".lock"]
    assert content(files.cached("things", {}, Builder())) == "made"


def test_what_a_killed_build_left_is_cleared_away(root):
    entry = files.cached("things", {}, Builder())
    stale = entry.with_name(f"{files.TEMPORARY}12345-{entry.name}")
    entry.rename(stale)
    assert files.cached("things", {}, Builder("again")) == entry
    assert content(entry) == "again" and not stale.exists()


WORKER = """
import sys, time
from pathlib import Path
from lm_envs import files

def build(folder):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    (folder / "content.txt").write_text("made")

print((files.cached("things", {}, build) / "content.txt").read_text())
"""


def test_of_processes_that_ask_at_once_one_builds(tmp_path):
    log = tmp_path / "log"
    checkout = Path(files.__file__).parent.parent
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(log)], stdout=subprocess.PIPE, text=True, cwd=checkout, env=os.environ
        )
        for _ in range(3)
    ]
    assert [worker.communicate(timeout=60)[0].strip() for worker in workers] == ["made"] * 3
    assert log.read_text() == "built\n"


def test_an_entry_is_not_there_before_it_is_whole(tmp_path):
    seen = []

    def build(folder):
        seen.append(files.damaged(files.cache_root() / "things" / files.key_of({})) is None)
        seen.append(folder.parent == files.cache_root() / "things")  # the rename stays within one file system
        Builder()(folder)

    assert files.damaged(files.cached("things", {}, build)) is None
    assert seen == [False, True]


def test_a_cache_that_may_only_be_read_still_serves(monkeypatch):
    entry = files.cached("things", {}, Builder())

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert files.cached("things", {}, Builder()) == entry


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "file" / "cache"))
    build = Builder()
    with pytest.raises(
        files.CacheError, match=r"cannot use the cache folder .*file/cache: Not a directory; .*LM_ENVS_CACHE"
    ) as found:
        files.cached("things", {}, build)
    assert build.calls == 0 and "\n" not in str(found.value)


def test_a_full_disk_is_noticed_before_building():
    build = Builder()
    with pytest.raises(files.CacheError, match="No space left on device"):
        files.cached("things", {}, build, needs_bytes=1 << 62)
    assert build.calls == 0


def test_a_disk_that_fills_up_while_building(root):
    def build(folder):
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(files.CacheError, match="No space left on device"):
        files.cached("things", {}, build)
    assert not list((root / "things").glob(f"{files.TEMPORARY}*"))


@pytest.mark.parametrize("kind", ["a file", "a loop", "too long", "read-only"])
def test_folders_that_cannot_be_used(tmp_path, monkeypatch, kind):
    folder = tmp_path / "cache"
    if kind == "a file":
        folder.write_text("")
    elif kind == "a loop":
        folder.symlink_to(folder)
    elif kind == "too long":
        folder = tmp_path / ("x" * 300)
    else:
        if os.getuid() == 0:
            pytest.skip("root writes everywhere")
        folder.mkdir(mode=0o500)
    monkeypatch.setenv("LM_ENVS_CACHE", str(folder))
    build = Builder()
    with pytest.raises(files.CacheError, match=rf"cannot use the cache folder {folder}: .*; .*LM_ENVS_CACHE") as found:
        files.cached("things", {}, build)
    assert build.calls == 0 and "\n" not in str(found.value) and explain(found.value) == str(found.value)


PLACES = ("ENOSPC", "EROFS", "EIO", "ESTALE", "EMFILE", "ENOLCK", "ELOOP", "ENAMETOOLONG", "EDQUOT", "ENOENT")


@pytest.mark.parametrize("where", ["mkdir", "flock", "rename"])
@pytest.mark.parametrize("name", PLACES)
def test_whatever_the_file_system_says_is_one_line(root, monkeypatch, name, where):
    def refuse(*args, **kwargs):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    target = {"mkdir": (Path, "mkdir"), "flock": (fcntl, "flock"), "rename": (os, "replace")}[where]
    if (name, where) == ("ENOENT", "flock"):
        pytest.skip("flock does not say so")
    with monkeypatch.context() as patch:
        patch.setattr(*target, refuse)
        with pytest.raises(files.CacheError, match=os.strerror(getattr(errno, name))) as found:
            files.cached("things", {}, Builder())
    assert str(root) in str(found.value) and "\n" not in str(found.value) and explain(found.value)
    assert ("ulimit -n" if name == "EMFILE" else "LM_ENVS_CACHE") in str(found.value)
    assert not list(root.rglob(f"{files.TEMPORARY}*")) and content(files.cached("things", {}, Builder())) == "made"


def test_a_home_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("LM_ENVS_CACHE", "~no-such-user/cache")
    with pytest.raises(files.CacheError, match="no cache folder: .*home.*; set LM_ENVS_CACHE"):
        files.cache_root()


def test_a_file_of_the_build_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path):
    def build(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "mine.jsonl"))

    with pytest.raises(PermissionError, match="mine.jsonl"):
        files.cached("things", {}, build)


def test_an_error_of_the_build_itself_stays_what_it_is():
    def build(folder):
        (folder / "absent").read_text()

    with pytest.raises(FileNotFoundError, match="absent"):
        files.cached("things", {}, build)


def test_the_manifest_says_what_an_entry_was_made_from():
    entry = files.cached("things", {"seed": 3}, Builder())
    manifest = json.loads((entry / files.MANIFEST).read_text())
    assert manifest["made_from"] == {"seed": 3} and list(manifest["files"]) == [str(Path("sub", "content.txt"))]


def test_a_waiting_process_says_so(caplog):
    entry = files.cache_root() / "things" / files.key_of({})
    entry.parent.mkdir(parents=True)
    code = (
        "import sys, time\nfrom filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(0.6)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, f"{entry}.lock"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    started = time.monotonic()
    assert content(files.cached("things", {}, Builder())) == "made"
    assert "waiting for another process" in caplog.text and time.monotonic() - started > 0.2
    assert holder.wait(timeout=30) == 0
    holder.stdout.close()


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


def test_many_writers_of_one_file_lose_nothing(tmp_path):
    """Each writes a temporary file of its own: at any time the content is one writer's, whole."""
    from concurrent.futures import ThreadPoolExecutor

    texts = [str(i) * 5000 for i in range(8)]

    def write(text):
        for _ in range(25):
            write_atomic(tmp_path / "a", text)
            assert (tmp_path / "a").read_text() in texts

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, texts))
    assert os.listdir(tmp_path) == ["a"]
