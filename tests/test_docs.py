"""What the pages of docs/ show runs as it stands, but for what their marks say (tests/pages.py); the tree of modules is
the one that is there."""

import re

import gymnasium
import pytest
import torch

from lm_envs.tasks import TASKS
from tests import pages
from tests.house import CHECKOUT

PAGES = sorted((CHECKOUT / "docs").glob("*.md"))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder and a seed of one's own, and registries that are put back."""
    monkeypatch.chdir(tmp_path)
    kept = [(registry, dict(registry)) for registry in (gymnasium.registry, TASKS)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield tmp_path
    for registry, before in kept:
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page, reader):
    pages.run(page)


def shown(*lines):
    return "\n".join(["# A page", *lines]) + "\n"


def run(reader, *lines):
    (reader / "page.md").write_text(shown(*lines))
    pages.run(reader / "page.md")


def test_blocks_share_a_module_and_run_in_order(reader, capsys):
    run(reader, "```python", "x = 1", "```", "text", "```python", "print(x + 1, __name__)", "```")
    assert capsys.readouterr().out == "2 page_page\n"


def test_setup_and_shortened_values(reader, capsys):
    lines = ["<!-- setup", "x = 1", "-->", "<!-- shorten: 40 => 2; 64 => 4 -->", "```python", "print(x, 40, 64)", "```"]
    run(reader, *lines)
    assert capsys.readouterr().out == "1 2 4\n"


def test_a_block_that_fails_fails_on_the_line_of_the_page(reader):
    with pytest.raises(NameError) as caught:
        run(reader, "```python", "x = 1", "print(undefined)", "```")
    assert caught.traceback[-1].lineno + 1 == 4 and str(caught.traceback[-1].path).endswith("page.md")


def test_what_is_not_run_is_compiled(reader):
    run(reader, "<!-- not run: there is nothing to import -->", "```python", "import no_such_module", "```")
    with pytest.raises(SyntaxError):
        run(reader, "<!-- not run: unfinished -->", "```python", "import", "```")


@pytest.mark.parametrize(
    "lines",
    [
        ["- in a list", "  ```python", "  1 / 0", "  ```"],
        ["~~~python", "1 / 0", "~~~"],
        ["```py", "1 / 0", "```"],
        ["```python title=x", "1 / 0", "```"],
        ["<!-- not run: because -->", "only text"],
        ["<!-- not run -->", "```python", "1 / 0", "```"],
        ["<!-- shorten: 40 => 2 -->", "```python", "print(30)", "```"],
        ["<!-- shorten: 30 -->", "```python", "print(30)", "```"],
    ],
)
def test_nothing_is_left_out_silently(lines):
    with pytest.raises(ValueError):
        pages.blocks(shown(*lines))


def test_other_languages_are_no_python():
    assert pages.blocks(shown("```", "text", "```", "```bash", "python examples/awr.py", "```")) == []


def test_the_tree_names_what_is_there():
    """Every file of the annotated tree exists, and every module of the four rooms is in it."""
    tree = (CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
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
    missing = sorted(name for name in named if not (CHECKOUT / name).exists())
    assert not missing
    modules = {
        str(path.relative_to(CHECKOUT))
        for folder in ("kernels", "lm_envs", "algos", "benchmarks")
        for path in (CHECKOUT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert not sorted(modules - named)
