"""Commands that are killed at a file operation, or whose folders are damaged, and then go on; in forked processes.

    python -m tests.benchmarks.run.ordeals sft kill=1 raise=7 damage=20

kills ``sft`` at each operation on a file, lets every seventh fail as on a full disk, and damages its folder, finished
or half-finished, twenty times. ``left=1`` goes on from what a kill at each operation leaves on the disk, which takes a
quarter of the time. Other commands: COMMANDS, and ``people`` (``lm-envs people next``); several with commas
between. Faults are printed, and the status is then 1.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import gc
import importlib
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lm_envs.benchmarks import cli
from lm_envs.benchmarks.report import html
from lm_envs.benchmarks.run.one_run import versions
from lm_envs.data.sources import fingerprint
from lm_envs.feedback.annotators import Annotator, work
from lm_envs.feedback.store import open_study
from tests.benchmarks.fake_task import NAME
from tests.lm_envs import byo

Outcome = tuple[str, str | None]
"""What happened, and what was wrong after it."""
KILLED = -signal.SIGKILL
EACH = 0  # operations are counted from 1
COMMANDS = ("train", "compare", "sft", "reward-model", "dpo")
_PPO = ("episodes=4", "epochs=1", "minibatches=1")


def arguments(root: Path, command: str) -> list[str]:
    """A small run of a command; what it reads is made in ``root``, and what it goes on with in ``root / "begun"``."""
    often = ["--validate-every", "1", "--checkpoint-every", "1", "--iterations", "3", "--threads", "1"]
    if command == "train":
        sets = [word for each in _PPO for word in ("--set", each)]
        return ["train", "--task", NAME, "--algorithm", "ppo", *often, *sets]
    if command == "compare":
        suite = root / "suite.toml"
        suite.write_text(
            f'tasks = ["{NAME}"]\nalgorithms = ["sft", "ppo"]\nbudget = {{ iterations = 2 }}\ncheckpoints.every = 1\n'
            "[evaluation]\ntest_prompts = 8\nvalidation_prompts = 4\nevery = 1\n[algorithm.ppo]\n" + "\n".join(_PPO)
        )
        return ["compare", "--suite", str(suite), "--threads", "1"]
    if command == "people":
        study_in_rounds(root, root / "begun")
        everybody_answers(root / "begun")
        return ["people", "next"]
    tokenizer = byo.byte_level_bpe()
    byo.llama(len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    said = {"completion": " ate ."} if command == "sft" else {"chosen": " ate .", "rejected": " hid"}
    rows = byo.write_jsonl(root / "rows.jsonl", [{"prompt": f"the cat {i}", **said} for i in range(12)])
    places = ["--model", str(root / "model"), "--data", str(rows)]
    return [command, *places, "--batch-size", "4", "--held-out", "0.3", *often]


def study_in_rounds(root: Path, study: Path) -> None:
    """A study that is ready for ``people next``, and in ``root`` what it needs, all small."""
    policy = byo.make(root / "byo").options["policy"]
    rows = [{"prompt": f"the {a} cat {b} a"} for a in ("old", "grey", "small", "red") for b in ("saw", "ate", "hid")]
    prompts = byo.write_jsonl(root / "prompts.jsonl", rows)
    new = ["people", "new", "--policy", policy, "--prompts", str(prompts), "--max-new-tokens", "4", "--limit", "9"]
    cli.main([*new, "--out", str(study)])
    path = study / "loop.toml"
    text = path.read_text().replace("[reward_model]", '[reward_model]\niterations = 2\nset = ["episodes=4"]')
    path.write_text(text.replace("[train]", '[train]\niterations = 1\nset = ["episodes=4", "minibatches=1"]'))


def everybody_answers(study: Path) -> None:
    """The longer text is better: something that a reward model can learn."""
    person = Annotator(lambda item: [float(len(r.text)) for r in item.responses], temperature=0)
    work(open_study(study), "ann", person)


# ---- what happens to files ----


class Watch:
    """Counts operations on files below a folder in the main thread, and acts at one of them."""

    def __init__(self) -> None:
        self.below, self.at, self.seen = "", -1, 0
        self.act: Callable[[], None] = lambda: None
        sys.addaudithook(self._hook)
        os.fsync = self._counted(os.fsync)

    def _counted(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            if self.below:
                self._one()
            sync(descriptor)

        return fsync

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.below or threading.current_thread() is not threading.main_thread():
            return
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            here = writes and self._here(args[0])
        elif event in ("os.rename", "os.truncate", "os.mkdir"):
            here = self._here(args[0])
        elif event in ("os.remove", "os.rmdir"):  # inside shutil.rmtree they come without the folder
            here = self._here(args[0]) or args[1] != -1
        else:
            return
        if here:
            self._one()

    def _here(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.below)

    def _one(self) -> None:
        self.seen += 1
        if self.at in (self.seen, EACH):
            below, self.below = self.below, ""
            self.act()
            self.below = below


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here")


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {}


def _damage(function: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    DAMAGES[function.__name__] = function
    return function


def _lines(path: Path, change: Callable[[list[bytes]], None]) -> None:
    lines = path.read_bytes().split(b"\n")
    change(lines)
    path.write_bytes(b"\n".join(lines))


@_damage
def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(max(1, path.stat().st_size)))


@_damage
def empty(path: Path, rng: random.Random) -> None:
    os.truncate(path, 0)


@_damage
def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


@_damage
def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


@_damage
def zeros(path: Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@_damage
def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


@_damage
def double(path: Path, rng: random.Random) -> None:
    def change(lines: list[bytes]) -> None:
        i = rng.randrange(len(lines))
        lines.insert(i, lines[i])

    _lines(path, change)


@_damage
def swap(path: Path, rng: random.Random) -> None:
    def change(lines: list[bytes]) -> None:
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]

    _lines(path, change)


@_damage
def retype(path: Path, rng: random.Random) -> None:
    """Another JSON type for a value of a line, or of the file."""

    def change(lines: list[bytes]) -> None:
        i = rng.randrange(len(lines))
        with contextlib.suppress(ValueError):
            found = json.loads(lines[i])
            found[rng.choice(list(found))] = rng.choice([None, [], {}, "text", -1])
            lines[i] = json.dumps(found).encode()

    if path.suffix == ".json":
        found = json.loads(path.read_text())
        found[rng.choice(list(found))] = rng.choice([None, [], {}, "text", -1])
        path.write_text(json.dumps(found))
    else:
        _lines(path, change)


@_damage
def foreign(path: Path, rng: random.Random) -> None:
    """A neighbour's content."""
    others = [other for other in path.parents[1].rglob(f"*{path.suffix}") if other.is_file()]
    shutil.copy(rng.choice(others), path) if (others := [o for o in others if o != path]) else path.unlink()


@_damage
def dangling(path: Path, rng: random.Random) -> None:
    """A link to nothing: it cannot be read, whoever tries."""
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


# ---- what has to be the same ----


def _lasting(value: Any) -> Any:
    """Without what depends on the clock, and hashes of it."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.endswith(("_s", "per_second")) and k != "records"}
        return {k: _lasting(v) for k, v in kept.items()}
    return value


def _content(path: Path) -> Any:
    if path.name.endswith(".jsonl"):
        return [_lasting(json.loads(line)) for line in path.read_text().split("\n") if line]
    if path.suffix == ".json":
        return _lasting(json.loads(path.read_text()))
    if path.suffix == ".sqlite":
        with contextlib.closing(sqlite3.connect(path)) as database:
            return list(database.iterdump())
    if path.suffix == ".csv":
        return [_lasting(row) for row in csv.DictReader(path.read_text().splitlines())]
    return path.read_bytes()


_PASSING = (".lock", "manifest.json", "report.html", "log.txt", "study.sqlite-wal", "study.sqlite-shm")


def facts(out: Path) -> dict[str, Any]:
    """What a finished command leaves that may not depend on kills and damages, by file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if ".tmp-" in name:
            found[name] = "left over"
        elif not path.is_file() or path.name in _PASSING or "tensorboard" in name:
            continue
        else:
            try:
                found[name] = _content(path)
            except (ValueError, AttributeError):  # damaged, and left as it is
                found[name] = path.read_bytes()
    for place in sorted(out.rglob("tensorboard")):
        read = EventAccumulator(str(place))
        try:
            read.Reload()
        except OSError:  # a folder in the place of an event file
            found[str(place.relative_to(out))] = "not readable"
            continue
        tags = [tag for tag in read.Tags()["scalars"] if not tag.endswith(("_s", "per_second"))]
        found[str(place.relative_to(out))] = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in tags}
    return found


# ---- a command, in a process of its own ----


class Ordeal:
    """A command, and what it gives where nothing happens to it."""

    def __init__(self, root: Path, command: str, watch: Watch) -> None:
        self.root, self.command, self.watch, self.words = root, command, watch, arguments(root, command)
        torch.set_num_threads(1)
        versions()  # once: somebody may edit the code meanwhile
        # All in one place, whose name may be written into files; the finished folder lies elsewhere.
        self.out, self.whole = root / "out", root / "whole"
        status, said = self.run(-1)
        if status:
            raise RuntimeError(said)
        for name in (root / "modules").read_text().split("\n"):  # what it imports on the way, once for all forks
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        gc.collect()
        gc.freeze()
        self.operations = int(said.rsplit("\n", 1)[1])
        self.facts = facts(self.out)
        self.out.rename(self.whole)

    def run(self, at: int, act: Callable[[], None] = die, resume: bool = False) -> tuple[int, str]:
        """Status and what was printed; at the end of it how many operations there were."""
        said, begun = self.root / "said", self.root / "begun"
        if begun.exists() and not resume:
            shutil.copytree(begun, self.out)
        child = os.fork()
        if child == 0:
            status = 70
            try:
                file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, 1)
                os.dup2(file, 2)
                sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(i, "wb", 0), write_through=True) for i in (1, 2))
                if resume:  # event files are named by the second: the next one has begun
                    now = time.time
                    time.time = lambda: now() + 2.0
                self.watch.below, self.watch.at, self.watch.act = str(self.out), at, act
                place = [str(self.out)] if begun.exists() else ["--out", str(self.out), *["--resume"] * resume]
                status = self._main([*self.words, *place])
                self.watch.below = ""
                print(f"\n{self.watch.seen}", end="")
                (self.root / "modules").write_text("\n".join(sys.modules))
            except BaseException:  # noqa: BLE001  (of a process that ends here)
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, said.read_text(errors="replace")

    def _main(self, words: list[str]) -> int:
        try:
            cli.main(words)
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    def goes_on(self, damaged: Path | None = None) -> str | None:
        """What is wrong with how the command goes on, None if it ends like the undisturbed one. Where a file
        was damaged it may also end in one line, and leave the file as it is if nothing reads it any more.
        """
        status, said = self.run(-1, resume=True)
        if status == 1 and damaged is not None:
            lines = [line for line in said.split("\n") if line.startswith("lm-envs: ")]
            return None if len(lines) == 1 and "Traceback" not in said else f"{len(lines)} lines: {said}"
        if status:
            return f"status {status}: {said}"
        found = facts(self.out)
        wrong = {name for name in {*found, *self.facts} if found.get(name) != self.facts.get(name)}
        if damaged is not None and {"checkpoints", "data", "tensorboard"} & set(damaged.relative_to(self.out).parts):
            wrong -= {str(place.relative_to(self.out)) for place in (damaged, damaged.parent)}
        return f"other {sorted(wrong)}: {said}" if wrong else None

    def killed(self, every: int) -> Iterator[Outcome]:
        """Killed at every so manyth operation, and continued."""
        return self._struck(every, die)

    def left(self, every: int) -> Iterator[Outcome]:
        """Continued from what a kill at every so manyth operation leaves.

        One run leaves a copy of its folder at each, since a command that goes on sees no more than what is on the disk;
        from folders that are alike it goes on once.
        """
        copies, first = self.root / "copies", 1 + (every > 1)

        def keep() -> None:
            if self.watch.seen % every == first % every and self.out.exists():  # the first operation makes it
                shutil.copytree(self.out, copies / str(self.watch.seen), symlinks=True)

        status, said = self.run(EACH, keep)
        if status:
            raise RuntimeError(said)
        known: dict[str, str | None] = {}
        for at in range(first, self.operations + 1, every):
            shutil.rmtree(self.out, ignore_errors=True)
            if (copies / str(at)).exists():
                shutil.move(copies / str(at), self.out)
            names = sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*"))
            alike = f"{names} {fingerprint(self.out)}" if names else ""
            if alike not in known:
                known[alike] = self.goes_on()
            yield f"operation {at}", known[alike]
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(copies)
        print(f"{self.command}: {len(known)} folders that differ", flush=True)

    def failed(self, every: int) -> Iterator[Outcome]:
        """The operation fails, as on a full disk; then the command goes on."""
        return self._struck(every, full)

    def _struck(self, every: int, act: Callable[[], None]) -> Iterator[Outcome]:
        for at in range(1 + (every > 1), self.operations + 1, every):
            status, said = self.run(at, act)
            wrong = None
            if act is die and status != KILLED:
                wrong = f"was not killed but ended with {status}: {said}"
            elif act is full and (status not in (0, 1) or "Traceback" in said):
                wrong = f"status {status}: {said}"
            yield f"operation {at}", wrong or self.goes_on()
            shutil.rmtree(self.out, ignore_errors=True)

    def damaged(self, count: int) -> Iterator[Outcome]:
        """Random damages of the finished folder and of one that was killed, from which the command goes on."""
        half = self.root / "half"
        self.run(self.operations * 3 // 5)
        self.out.rename(half)
        rng = random.Random(self.command)
        for _ in range(count):
            source = rng.choice([self.whole, half])
            shutil.copytree(source, self.out, symlinks=True)
            path = rng.choice([path for path in sorted(self.out.rglob("*")) if path.is_file()])
            name = rng.choice(list(DAMAGES))
            with contextlib.suppress(ValueError, IndexError, TypeError):  # not every file can be damaged in every way
                DAMAGES[name](path, rng)
            yield f"{source.name}: {name} {path.relative_to(self.out)}", self.goes_on(path)
            shutil.rmtree(self.out)


def main(commands: Sequence[str], wanted: Sequence[str]) -> int:
    """Carry them out and print their faults; how many."""
    html.figures = lambda series: {}  # drawing takes most of the time, and is written as the rest is
    watch, faults = Watch(), 0
    for command in commands:
        with tempfile.TemporaryDirectory() as root:
            ordeal = Ordeal(Path(root), command, watch)
            kinds = {"kill": ordeal.killed, "left": ordeal.left, "raise": ordeal.failed, "damage": ordeal.damaged}
            for each in wanted:
                kind, _, number = each.partition("=")
                right = count = 0
                for where, what in kinds[kind](int(number)):
                    count, right = count + 1, right + (what is None)
                    if what is not None:
                        print(f"{command}, {kind}, {where}: {what}", flush=True)
                print(f"{command}, {kind}: {right} of {count} ({ordeal.operations} operations)", flush=True)
                faults += count - right
    return faults


if __name__ == "__main__":
    faults = main(sys.argv[1].split(","), sys.argv[2:])
    os._exit(faults > 0)  # quicker than taking apart what every fork had
