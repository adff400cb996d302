"""What the README shows runs as it stands, each block by itself, and it is short."""

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


def test_it_is_short():
    prose = [line for line in README.splitlines() if not line.startswith("|")]
    assert len(" ".join(prose).split()) <= 800
