"""MkDocs hooks: the pages that are generated (API reference, command line, changelog, contributing), and mathematics.

The API reference is read from the sources, statically. Three of the four top folders stand beside `lm_envs/` in the
checkout and are imported as `lm_envs.algos`, `lm_envs.benchmarks` and `lm_envs.kernels`, so the build first copies the
modules into the package tree that an installed wheel has, under `build/docs`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
TREE = ROOT / "build" / "docs" / "lm_envs"
FOLDERS = ("lm_envs", "algos", "benchmarks", "kernels")
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}

LEADERBOARD = """# Leaderboard

Each table is the `leaderboard.json` that `lm-envs report` wrote for the folder of a suite. Numbers are means with 95 %
intervals over test prompts and training seeds ([statistics](statistics.md)). Methods in bold cannot be told apart from
the first. A score is 0 for SFT, and 1 for the optimum where that is known.
"""
FENCED = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
SOURCE_PATH = re.compile(r"(?<!\[)`((?:lm_envs|algos|benchmarks|kernels)/[\w/]+)\.py`")
ARITHMATEX = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_startup(command: str, dirty: bool) -> None:
    """Lay out the sources as the installed package has them, before mkdocstrings looks for them."""
    shutil.rmtree(TREE.parent, ignore_errors=True)
    for folder in FOLDERS:
        target = TREE if folder == "lm_envs" else TREE / folder
        shutil.copytree(ROOT / folder, target, ignore=lambda _, names: [n for n in names if "__pycache__" in n])
    for folder in [TREE, *(path for path in TREE.rglob("*") if path.is_dir())]:
        if any(folder.glob("*.py")):
            (folder / "__init__.py").touch()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference into the navigation."""
    config.nav.append({"API reference": ["reference/index.md", *_navigation()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for source, page in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text).replace("](README.md", "](index.md")
        text = text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](CHANGELOG.md", "](changelog.md")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "cli.md", content=command_line()))
    files.append(File.generated(config, "leaderboard.md", content=leaderboard()))
    files.append(File.generated(config, "reference/index.md", content=_reference_index()))
    for name in modules():
        content = f"# `{name}` {{ #{name} }}\n\n::: {name}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def leaderboard() -> str:
    """Make the page of the results in ``benchmarks/results/leaderboard``, a table per suite and task."""
    parts = [LEADERBOARD]
    for path in sorted((ROOT / "benchmarks" / "results" / "leaderboard").glob("*.json")):
        held = json.loads(path.read_text(encoding="utf-8"))
        versions = ", ".join(f"{name} {version}" for name, version in held["versions"].items())
        for task in held["tasks"]:
            measure = "gold" if "gold" in task["methods"][0] else "proxy"
            prompts = f" {task['prompts']:,} test prompts." if task["prompts"] else ""
            parts += [f"## {held['suite']}: {task['task']}\n", f"{held['description']}.{prompts} {versions}.\n"]
            titles = ("method", "seeds", "score", measure, "win-rate %", "KL", "tokens")
            parts += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
            for row in task["methods"]:
                name = f"**{row['method']}**" if row["not_told_from_the_best"] else row["method"]
                cells = [name, str(len(row["seeds"])), _cell(row["score"], 3), _cell(row[measure], 2)]
                cells += [_cell(row["win_rate"], 1, 100), "–" if row["kl"] is None else f"{row['kl']:.1f}"]
                parts.append(f"| {' | '.join([*cells, format(row['tokens_generated'], ',.0f')])} |")
            parts.append("")
    return "\n".join(parts)


def _cell(found: list[float | None], digits: int, factor: float = 1) -> str:
    """A value with the ends of its interval, which may be unknown."""
    value, low, high = found
    if value is None:
        return "–"
    text = f"{factor * value:.{digits}f}"
    return text if low is None else f"{text} [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link the source files that a page names, outside blocks of code, to their reference pages."""
    if page.file.src_uri.startswith("reference/"):
        return markdown
    known = modules()

    def link(match: re.Match[str]) -> str:
        folder, _, rest = match[1].partition("/")
        name = f"lm_envs.{rest}" if folder == "lm_envs" else f"lm_envs.{folder}.{rest}"
        name = name.replace("/", ".")
        return f"[`{match[1]}.py`](reference/{name}.md)" if name in known else match[0]

    parts, last = [], 0
    for block in FENCED.finditer(markdown):
        parts += [SOURCE_PATH.sub(link, markdown[last : block.start()]), block[0]]
        last = block.end()
    return "".join([*parts, SOURCE_PATH.sub(link, markdown[last:])])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Render LaTeX as MathML, which browsers show without a script."""

    def mathml(match: re.Match[str]) -> str:
        text = match[3].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(text.strip(), display="inline" if match[2] == "(" else "block")

    return ARITHMATEX.sub(mathml, html)


def modules() -> dict[str, str]:
    """The modules of the reference by import name, with the first sentence of their docstrings."""
    found = {}
    for path in sorted(TREE.rglob("*.py")):
        parts = path.relative_to(TREE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text:
            found[name] = " ".join(text.split("\n\n")[0].split())
    return found


def command_line() -> str:
    """The help texts of all commands, as the program prints them."""
    parts = ["# Command line", ""]
    parts.append("The help of each command, as `lm-envs COMMAND --help` prints it. `--traceback` with any command")
    parts += ["shows where an error came from.", ""]
    parts += _help(())
    return "\n".join(parts)


def _help(words: tuple[str, ...]) -> list[str]:
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "lm_envs.benchmarks.cli", *words, "--help"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.rstrip()
    lines = [f"{'##' if len(words) < 2 else '###'} `{' '.join(('lm-envs', *words))}`", "", "```text", text, "```", ""]
    listed = re.match(r"usage: lm-envs[^{]*\[-h\] \{([\w,\s-]+)\}", text)
    for name in re.split(r",\s*", listed[1]) if listed else ():
        lines += _help((*words, name))
    return lines


def _room(name: str) -> str:
    """The package that a module stands in."""
    folder = TREE.parent.joinpath(*name.split("."))
    return name if folder.is_dir() else name.rpartition(".")[0]


def _by_room() -> dict[str, list[str]]:
    rooms: dict[str, list[str]] = {}
    for name in modules():
        rooms.setdefault(_room(name), []).append(name)
    return dict(sorted(rooms.items()))


def _navigation() -> list[dict[str, list[dict[str, str]]]]:
    return [
        {room: [{name.rpartition(".")[2] if name != room else room: f"reference/{name}.md"} for name in names]}
        for room, names in _by_room().items()
    ]


def _reference_index() -> str:
    texts, lines = modules(), ["# API reference", ""]
    lines += ["Every module with a docstring, by room. [Architecture](../architecture.md) explains the rooms.", ""]
    for room, names in _by_room().items():
        lines += [f"## `{room}`", "", "| module | |", "|---|---|"]
        for name in names:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", texts[name]).replace("|", "\\|").replace("``", "`")
            lines.append(f"| [`{name}`]({name}.md) | {text} |")
        lines.append("")
    return "\n".join(lines)
