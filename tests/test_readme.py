"""What the README shows runs as it stands, each block by itself, and its tree is the tree."""

import re
from pathlib import Path

import pytest

from tests import pages

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = pages.blocks(README)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number, capsys):
    """Each by itself."""
    exec(compile(BLOCKS[number].code, f"README.md, block {number}", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_the_tree_names_what_is_there():
    """Every file of the annotated tree exists, and every module of the four rooms is in it."""
    tree = README.split("## The tree")[1].split("```")[1]
    room, named = "", set()
    for line in tree.splitlines():
        found = re.match(r"( *)([\w./-]+)", line)
        if not found or not line.strip():
            continue
        indent, name = len(found[1]), found[2]
        if indent == 0:
            room = name if name.endswith("/") else ""
            named.add(name)
        else:
            named.add(room + name)
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("kernels", "lm_envs", "algos", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert not sorted(modules - named)
