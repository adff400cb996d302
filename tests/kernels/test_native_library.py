"""A compiled library is loaded only if it is what this user compiled, to the byte; anything else is compiled again."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tests.kernels.conftest  # noqa: F401
from lm_envs.kernels import native_library
from lm_envs.kernels.native_library import Unavailable, load
from tests.house import CHECKOUT
from tests.marks import slow_unless

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="no compiler on this machine"
)

# Without what the package above imports, which takes seconds.
LOAD = """
import sys, types
from pathlib import Path
package = types.ModuleType("lm_envs")
package.__path__ = [sys.argv[2]]
sys.modules["lm_envs"] = package
from lm_envs.kernels.native_library import load
print(load(Path(sys.argv[1]), ("-O1", "-shared", "-fPIC")).answer())
"""


class Place:
    """A C file, a cache, a temporary folder, and a compiler that counts its calls."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.source, self.cache, self.log = root / "answer.c", root / "cache", root / "calls"
        self.source.write_text("int answer(void) { return 42; }\n")
        self.temporary = root / "temporary"
        self.temporary.mkdir()
        compiler = root / "compiler"
        real = shutil.which("cc") or shutil.which("gcc")
        compiler.write_text(f'#!/bin/sh\necho call >> "{self.log}"\nexec {real} "$@"\n')
        compiler.chmod(0o755)
        self.environment = {"CC": str(compiler), "LM_ENVS_CACHE": str(self.cache), "TMPDIR": str(self.temporary)}
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(native_library.tempfile, "tempdir", None)

    def answer(self) -> int:
        """In a process of its own: a process loads a path once, whatever the file holds later."""
        run = subprocess.run(self.command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", LOAD, str(self.source), str(CHECKOUT)]

    @property
    def calls(self) -> int:
        return len(self.log.read_text().split()) if self.log.exists() else 0

    @property
    def library(self) -> Path:
        (found,) = (self.cache / "native").glob("*.so")
        return found


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_it_is_compiled_once(place):
    assert place.answer() == place.answer() == 42
    assert place.calls == 1 and not list(place.temporary.iterdir())
    assert oct((place.cache / "native").stat().st_mode)[-3:] == "700"


def test_of_processes_that_start_at_once_one_compiles(place):
    workers = [subprocess.Popen(place.command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [worker.communicate(timeout=120)[0].strip() for worker in workers] == ["42"] * 3
    assert place.calls == 1


def other(place: Place) -> bytes:
    """A library that answers something else, as an attacker's or a wrong one would."""
    (place.source.parent / "other.c").write_text("int answer(void) { return 666; }\n")
    made = place.source.parent / "other.so"
    subprocess.run([shutil.which("cc") or "gcc", "-shared", "-fPIC", "-o", made, made.with_suffix(".c")], check=True)
    return made.read_bytes()


def _link(place: Place) -> None:
    library = place.library
    moved = place.source.parent / "moved.so"
    shutil.move(library, moved)
    library.symlink_to(moved)


DAMAGE = {
    "a link": _link,
    "truncated": lambda place: place.library.write_bytes(place.library.read_bytes()[:2000]),
    "a bit flipped": lambda place: place.library.write_bytes(
        bytes(b ^ (i == 300) for i, b in enumerate(place.library.read_bytes()))
    ),
    "garbage": lambda place: place.library.write_bytes(b"garbage"),
    "another library": lambda place: place.library.write_bytes(other(place)),
    "no hash": lambda place: place.library.with_suffix(".sha256").unlink(),
    "others may write it": lambda place: place.library.chmod(0o777),
}


@pytest.mark.parametrize("damage", slow_unless("a bit flipped".__eq__, DAMAGE))
def test_what_is_damaged_or_not_ours_is_compiled_again(place, damage):
    assert place.answer() == 42
    DAMAGE[damage](place)
    assert place.answer() == 42 and place.calls == 2
    assert place.answer() == 42 and place.calls == 2  # and kept


@pytest.mark.parametrize(
    "kind", slow_unless("a link".__eq__, ["others may write the folder", "a file", "a link", "read-only"])
)
def test_without_a_private_folder_nothing_is_kept_or_left(place, kind):
    folder = place.cache / "native"
    place.cache.mkdir()
    if kind == "a file":
        folder.write_text("")
    elif kind == "a link":
        (place.source.parent / "elsewhere").mkdir()
        folder.symlink_to(place.source.parent / "elsewhere")
    elif kind == "read-only":
        if os.getuid() == 0:
            pytest.skip("root writes everywhere")
        folder.mkdir()
        folder.chmod(0o500)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert place.answer() == place.answer() == 42 and place.calls == 2
    assert not list(place.temporary.iterdir())
    assert not (folder.is_dir() and list(folder.iterdir()))


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EIO", "ENOLCK", "EMFILE", "ELOOP", "ENAMETOOLONG", "ESTALE"])
@pytest.mark.parametrize("where", ["mkdir", "flock", "replace"])
def test_a_cache_that_cannot_be_used_is_one_line(place, monkeypatch, caplog, name, where):
    real, number = os.replace, getattr(errno, name)

    def refuse(*args, **kwargs):
        if where == "replace" and str(place.temporary) in str(args[1]):
            return real(*args, **kwargs)
        raise OSError(number, os.strerror(number))

    target = {"mkdir": (Path, "mkdir"), "flock": (fcntl, "flock"), "replace": (native_library.os, "replace")}[where]
    monkeypatch.setattr(*target, refuse)
    assert load(place.source, ("-O1", "-shared", "-fPIC")).answer() == 42
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"folder {place.cache / 'native'} cannot be used" in told and os.strerror(number) in told
    assert "set LM_ENVS_CACHE" in told and "\n" not in told
    assert not list(place.temporary.iterdir()) and not list(place.cache.rglob("*.so"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_another_users_folder_is_not_trusted(place):
    assert place.answer() == 42
    os.chown(place.cache / "native", 65534, 65534)
    assert place.answer() == 42 and place.calls == 2


def test_a_compiler_that_fails_says_so(place, monkeypatch):
    place.source.write_text("this is no C\n")
    with pytest.raises(Unavailable, match="compiler: .*error"):
        load(place.source, ("-shared",))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(Unavailable, match="no-such-compiler"):
        load(place.source, ("-shared",))
    assert not list(place.cache.glob("native/*.so")) and not list(place.temporary.iterdir())
