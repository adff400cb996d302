"""The house rules: which room imports which, that importing is light, and what must not be committed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.house import CHECKOUT, FOLDERS, ORDER, modules, python


def import_name(path: Path, root: Path) -> str:
    """`algos/ppo.py` imports as `lm_envs.algos.ppo`."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts if parts[0] == "lm_envs" else ("lm_envs", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room a dotted name lies in, None for what is not ours: the longest entry of ORDER that it starts with."""
    found = [room for room in ORDER if module == room or module.startswith(room + ".")]
    return max(found, key=len, default=None)


def imported(path: Path, root: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of all a module imports: at the top, in functions, relatively, or by its name in a string."""
    name = import_name(path, root)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            # `from lm_envs import algos` names the room only together with what it imports
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"lm_envs(\.\w+)+(:\w+)?", node.value):
                found.append((node.lineno, node.value.partition(":")[0]))
    return found


def breaches(root: Path) -> list[str]:
    """Imports that go to the right in ORDER, and names that would load a second copy of a module."""
    found = []
    for path in modules(root):
        own = room_of(import_name(path, root))
        for line, name in imported(path, root):
            room = room_of(name)
            second_copy = name.split(".")[0] in ("kernels", "algos", "benchmarks") or name.startswith("lm_envs.lm_envs")
            # lm_envs/__init__.py registers ids by string, which everything may name
            later = room is not None and own != "lm_envs" and ORDER.index(room) > ORDER.index(own)
            if second_copy or later or (own == "lm_envs" and name.startswith(("lm_envs.algos", "lm_envs.benchmarks"))):
                found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


def test_imports_go_one_way():
    assert len(modules(CHECKOUT)) > 20
    assert breaches(CHECKOUT) == []


def test_every_module_lies_in_a_room():
    outside = [str(path) for path in modules(CHECKOUT) if room_of(import_name(path, CHECKOUT)) == "lm_envs"]
    assert outside == [str(CHECKOUT / "lm_envs" / "__init__.py")]
    named = {room_of(import_name(path, CHECKOUT)) for path in modules(CHECKOUT)}
    assert named == set(ORDER)


def test_the_drawing_names_the_rooms_in_order():
    svg = ElementTree.parse(CHECKOUT / "docs" / "assets" / "rooms.svg")
    drawn = {folder: svg.findall(f".//*[@id='{folder}']//*[@class='room']") for folder in FOLDERS}
    rooms: dict[str, list[str]] = {folder: [] for folder in FOLDERS}
    for room in ORDER:
        folder, _, name = room.removeprefix("lm_envs.").partition(".")
        if room == "lm_envs.__main__":  # a name for the command line, which the drawing has
            continue
        if room in ("lm_envs.algos", "lm_envs.benchmarks"):
            rooms[folder].append({"algos": "the algorithms", "benchmarks": "cli"}[folder])
        elif room not in ("lm_envs", "lm_envs.kernels"):
            rooms[folder if name else "lm_envs"].append(name or folder)
    assert {folder: [element.text for element in found] for folder, found in drawn.items()} == rooms


@pytest.mark.parametrize(
    ("where", "code", "breach"),
    [
        ("kernels/k.py", "import lm_envs", True),
        ("kernels/k.py", "from lm_envs import rng", True),
        ("kernels/k.py", "from lm_envs.kernels import other", False),
        ("kernels/k.py", "import torch\nfrom transformers import kernels", False),
        ("lm_envs/e.py", "from lm_envs.kernels.logprob_kl import logprob_kl", False),
        ("lm_envs/e.py", "def late():\n    from lm_envs.algos.ppo import PPO", True),
        ("lm_envs/e.py", "from lm_envs import algos", True),
        ("lm_envs/e.py", "from .algos import ppo", True),
        ("lm_envs/tasks/t.py", "from ..benchmarks import cli", True),
        ("lm_envs/tasks/__init__.py", "from ..algos import ppo", True),
        ("lm_envs/tasks/__init__.py", "from .task import TextTask", False),
        ("lm_envs/e.py", "NAMES = {'ppo': 'lm_envs.algos.ppo:PPO'}", True),
        ("lm_envs/e.py", "'''See lm_envs.algos.ppo.'''", False),
        ("lm_envs/model/m.py", "from lm_envs import rng", False),
        ("lm_envs/model/m.py", "from lm_envs.env.mdp import TextMDP", True),
        ("lm_envs/model/m.py", "def late():\n    from lm_envs.tasks import load", True),
        ("lm_envs/rng.py", "from lm_envs import files", True),
        ("lm_envs/tasks/t.py", "import lm_envs.env", True),
        ("lm_envs/env/m.py", "from lm_envs.tasks.base import TextTask", False),
        ("algos/ops/o.py", "from lm_envs.algos.policies.base import Policy", True),
        ("algos/engine/e.py", "from lm_envs.algos import ppo", True),
        ("algos/engine/e.py", "from lm_envs.algos.policies import base", False),
        ("algos/a.py", "from lm_envs.algos.other_libraries import sb3", True),
        ("benchmarks/run/r.py", "from lm_envs.benchmarks.report import plots", True),
        ("benchmarks/run/r.py", "from lm_envs.benchmarks import errors", False),
        ("benchmarks/commands/c.py", "import lm_envs.benchmarks.cli", True),
        ("algos/a.py", "from lm_envs import report\nimport lm_envs.kernels.k", False),
        ("algos/a.py", "class A:\n    def late(self):\n        import lm_envs.benchmarks.cli as cli", True),
        ("algos/a.py", "from ..benchmarks.cli import main", True),
        ("algos/a.py", "from . import ppo", False),
        ("benchmarks/b.py", "from lm_envs.algos import ppo", False),
        ("benchmarks/b.py", "import algos.ppo", True),
        ("benchmarks/b.py", "from kernels import logprob_kl", True),
        ("benchmarks/b.py", "import lm_envs.lm_envs.rng", True),
    ],
)
def test_a_breach_is_found(tmp_path, where, code, breach):
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert bool(breaches(tmp_path)) == breach


@pytest.mark.parametrize(
    "code", ["import kernels", "from algos.ppo import PPO", "import benchmarks.cli", "import lm_envs.lm_envs"]
)
def test_ruff_bans_second_copies(code):
    def check(text):
        command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "tests/x.py", "-"]
        return subprocess.run(command, input=text, cwd=CHECKOUT, capture_output=True, text=True)

    assert "TID251" in check(code).stdout
    assert (
        check(
            code.replace("import lm_envs.lm_envs", "import lm_envs")
            .replace("from algos", "from lm_envs.algos")
            .replace("import kernels", "import lm_envs.kernels")
            .replace("import benchmarks", "import lm_envs.benchmarks")
        ).returncode
        == 0
    )


def test_the_rooms_beside_lm_envs_are_no_packages():
    """A regular package `kernels` in the working directory would shadow the one that transformers imports."""
    assert [
        path for room in ("kernels", "algos", "benchmarks") for path in (CHECKOUT / room).rglob("__init__.py")
    ] == []


def test_every_module_says_what_it_is():
    assert [str(path) for path in modules(CHECKOUT) if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_importing_is_light():
    code = (
        "import sys, lm_envs, gymnasium\n"
        "assert 'lm_envs/Reviews-v0' in gymnasium.registry\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'matplotlib', 'scipy', 'tyro'} & set(sys.modules)))"
    )
    assert python("-c", code, cwd=CHECKOUT) == "[]\n"
    # negative control: the same look sees what a heavier module brings in
    assert "tyro" in python("-c", code.replace("gymnasium\n", "gymnasium, lm_envs.benchmarks.cli\n", 1), cwd=CHECKOUT)


MACHINE = re.compile(r"(?<![\w.:/~}-])/(?:home|root|Users|opt|work|farm|mnt)/\w|bash_jobs")


def text_files() -> list[Path]:
    """What a checkout holds: its top-level files and the text in its folders, caches left out."""
    tops = [path for path in CHECKOUT.iterdir() if path.is_file() and path.name != ".git"]  # a file in a worktree
    folders = (*FOLDERS, "tests", "docs", "examples", ".ci")
    inside = [path for folder in folders for path in (CHECKOUT / folder).glob("**/*") if path.is_file()]
    kinds = {".py", ".toml", ".md", ".txt", ".yaml", ".yml", ".json", ".jsonl", ".html", ".csv", ".svg", ""}
    hidden = re.compile(r"/\.(?!ci/)[^/]*/")
    return [
        path
        for path in tops + inside
        if path.suffix in kinds and not hidden.search(str(path.relative_to(CHECKOUT.parent)))
    ]


def test_no_paths_of_a_machine():
    found = [
        f"{path.relative_to(CHECKOUT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if MACHINE.search(line) and path != Path(__file__)
    ]
    assert found == []
    assert MACHINE.search('open("' + "/home" + '/me/data.jsonl")') and not MACHINE.search("https://x.org/home/me")
