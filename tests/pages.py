"""The Python blocks of a Markdown page, and running them as a reader would: from the top, in one module.

A comment that the rendered page does not show, on lines of its own, says what a block alone does not:

    <!-- setup                            code that is run here: what a fragment needs, what must hold by now
    import gymnasium
    -->
    <!-- shorten: 40 => 2; 5120 => 64     texts that the next block has other values for in a test
    -->
    <!-- not run: needs a GPU             the next block is compiled only, and why
    -->
"""

from __future__ import annotations

import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```python\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"^<!--\s*(?P<kind>setup|shorten|not run)\b:?(?P<text>.*?)-->", flags=re.DOTALL | re.MULTILINE)
ANY_PYTHON = re.compile(r"^\s*(?:`{3,}|~{3,})\s*\{?\.?py", flags=re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """``code`` begins on ``line`` of its page; ``why_not`` is empty where it is to be run."""

    line: int
    code: str
    why_not: str = ""


def blocks(text: str) -> list[Block]:
    """What a page says to run, in order.

    Raises:
        ValueError: a fence that this would miss, a mark that is not followed by a block, one without a reason, or a
            text to shorten that the block does not have.
    """
    fences, found = list(FENCE.finditer(text)), []
    if len(ANY_PYTHON.findall(text)) != len(fences):
        raise ValueError("a block of Python begins with ```python at the beginning of a line and ends with ```")
    marks: list[tuple[str, str]] = []
    for match in sorted([*fences, *COMMENT.finditer(text)], key=lambda match: match.start()):
        line = text.count("\n", 0, match.start()) + 1
        if "code" in match.groupdict():
            found.append(_marked(Block(line + 1, match["code"]), marks))
            marks = []
        elif match["kind"] == "setup":
            found.append(Block(line, match["text"]))
        else:
            marks.append((match["kind"], match["text"].strip()))
    if marks:
        raise ValueError(f"no block follows the mark {marks[0]}")
    return found


def _marked(block: Block, marks: list[tuple[str, str]]) -> Block:
    code, why_not = block.code, ""
    for kind, text in marks:
        if not text:
            raise ValueError(f"line {block.line}: say why or how: '<!-- {kind}: ... -->'")
        if kind == "not run":
            why_not = text
            continue
        for change in text.split(";"):
            long, arrow, short = (part.strip() for part in change.partition("=>"))
            if not arrow or long not in code:
                raise ValueError(f"line {block.line}: the block has no {long!r} to shorten")
            code = code.replace(long, short)
    return Block(block.line, code, why_not)


def run(page: Path) -> None:
    """Run a page's blocks; a traceback shows the page's own lines."""
    name = "page_" + re.sub(r"\W", "_", page.stem)
    module = sys.modules[name] = types.ModuleType(name)  # dataclasses and registries look modules up by their names
    try:
        for block in blocks(page.read_text(encoding="utf-8")):
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            if not block.why_not:
                exec(code, module.__dict__)
    finally:
        del sys.modules[name]
