"""Packaging: what the wheel and the sdist hold, that they install and are in nobody's way; pins and `make`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lm_envs import files
from tests.house import CHECKOUT, modules, python

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The sdist of a copy of the tree, and the wheel built from that sdist."""
    copy, out = tmp_path_factory.mktemp("tree") / "lm-envs", tmp_path_factory.mktemp("dist")
    shutil.copytree(
        CHECKOUT,
        copy,
        ignore=lambda folder, names: {
            name
            for name in names
            if name.startswith(("__pycache__", "."))
            or name.endswith(".egg-info")
            or (Path(folder) == CHECKOUT and name in ("build", "dist", "runs"))
        },
    )
    python("-m", "build", "--no-isolation", "--outdir", str(out), ".", cwd=copy)
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl")), "tree": copy}


def expected_in_wheel(root: Path) -> set[str]:
    """Every module under its import name, the suites, the C source, data files and the type marker."""
    files = [*modules(root), *(root / "benchmarks" / "suites").glob("*.toml"), root / "lm_envs" / "py.typed"]
    files += (root / "kernels").glob("*.c")
    files += (path for path in (root / "lm_envs/tasks/reviews_v0").rglob("*") if path.is_file())
    files += [
        *(root / "lm_envs/feedback/page").iterdir(),
        *(root / "lm_envs/tasks/prompts").iterdir(),
        root / "benchmarks/report/page.html",
        root / "benchmarks/probes/page.html",
    ]
    names = (path.relative_to(root) for path in files)
    return {str(name if name.parts[0] == "lm_envs" else Path("lm_envs") / name) for name in names}


def test_the_wheel_holds_the_tree_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built["wheel"]).namelist() if ".dist-info/" not in name}
    assert names == expected_in_wheel(built["tree"])
    assert any(name.startswith("lm_envs/benchmarks/suites/demo") for name in names)
    # negative control: a module that the package list does not reach would be missed
    extra = built["tree"] / "lm_envs" / "forgotten" / "module.py"
    extra.parent.mkdir()
    extra.write_text("")
    assert names != expected_in_wheel(built["tree"])
    shutil.rmtree(extra.parent)


def test_the_wheel_is_small_and_its_task_whole(built, site):
    assert built["wheel"].stat().st_size < 10e6
    assert files.damaged(site / "lm_envs" / "tasks" / "reviews_v0") is None


def test_the_sdist_can_be_built_and_tested(built):
    names = {name.partition("/")[2] for name in tarfile.open(built["sdist"]).getnames()}
    tree = {
        str(path.relative_to(built["tree"])) for path in [*modules(built["tree"]), *built["tree"].glob("tests/**/*.py")]
    }
    assert tree - names == set()
    assert {
        "LICENSE",
        "README.md",
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
        "benchmarks/suites/demo.toml",
    } <= names


@pytest.fixture(scope="module")
def site(built, tmp_path_factory) -> Path:
    """Our wheel unpacked next to somebody else's top-level package named `kernels`."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    with zipfile.ZipFile(built["wheel"]) as wheel:
        assert not [name for name in wheel.namelist() if name.startswith("kernels/")]
        wheel.extractall(folder)
    return folder


BOTH = (  # found, not executed: importing torch is not the point
    "from importlib.util import find_spec\n"
    "import kernels\n"
    "assert kernels.WHOSE == 'theirs'\n"
    "assert find_spec('lm_envs.algos.ppo') and find_spec('lm_envs.benchmarks.cli')\n"
    "print(find_spec('lm_envs.kernels.logprob_kl').origin)"
)


def test_installed_beside_another_kernels(site, tmp_path):
    assert Path(python("-c", BOTH, cwd=tmp_path, path=site).strip()) == site / "lm_envs" / "kernels" / "logprob_kl.py"


def test_a_checkout_beside_another_kernels(site, tmp_path):
    """The working directory comes first on the search path and holds a folder `kernels`: theirs still wins."""
    theirs = tmp_path / "theirs"
    shutil.copytree(site / "kernels", theirs / "kernels")
    assert Path(python("-c", BOTH, cwd=CHECKOUT, path=theirs).strip()) == CHECKOUT / "kernels" / "logprob_kl.py"
    # negative control: a regular package `kernels` there would win
    shadow = tmp_path / "shadow"
    shutil.copytree(CHECKOUT / "kernels", shadow / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (shadow / "kernels" / "__init__.py").touch()
    with pytest.raises(AssertionError, match="WHOSE"):
        python("-c", BOTH, cwd=shadow, path=theirs)


def test_the_command_line_is_there(site, tmp_path):
    entries = next(site.glob("lm_envs-*.dist-info")) / "entry_points.txt"
    assert "lm-envs = lm_envs.benchmarks.cli:main" in entries.read_text()
    assert "compare" in python("-m", "lm_envs.benchmarks.cli", "--help", cwd=tmp_path, path=site)


@pytest.mark.slow
@pytest.mark.parametrize("how", [["."], ["--editable", "."]], ids=["wheel", "editable"])
def test_pip_install(built, tmp_path, how):
    """In a fresh venv that sees this one's dependencies through a .pth file."""
    tree = tmp_path / "lm-envs"
    shutil.copytree(built["tree"], tree)
    python("-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    own = tmp_path / "venv" / "bin" / "python"
    packages = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = ("-m", "pip", "--python", str(own), "install", "-q", "--no-deps", "--no-build-isolation")
    python(*pip, *how, cwd=tree)
    code = "import lm_envs.algos.ppo, lm_envs.kernels.logprob_kl as k, lm_envs.env.cat; print(k.__file__)"
    where = subprocess.run([own, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    at = tree / "kernels" if "--editable" in how else packages / "lm_envs" / "kernels"
    assert Path(where) == at / "logprob_kl.py"
    script = tmp_path / "venv" / "bin" / "lm-envs"
    assert (
        "compare" in subprocess.run([script, "--help"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    )


@pytest.mark.slow
def test_the_real_kernels_package_and_transformers(built, tmp_path):
    """Needs the package index: PyPI's `kernels` and our wheel in one folder, in either order, with transformers."""
    for order in ((str(built["wheel"]), "kernels"), ("kernels", str(built["wheel"]))):
        folder = tmp_path / str(order[0] == "kernels")
        for what in order:
            python("-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), what, cwd=tmp_path)
        code = (
            "import transformers, kernels, lm_envs.kernels.logprob_kl\n"
            "from kernels import get_kernel\n"
            "from transformers import GPT2LMHeadModel\n"
            "import transformers.integrations.hub_kernels\n"
            "print(kernels.__file__)"
        )
        assert Path(python("-c", code, cwd=tmp_path, path=folder).strip()).parent == folder / "kernels"


def pins() -> dict[str, str]:
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_pins_are_plain_and_cover_the_requirements():
    for name, version in pins().items():
        assert name == canonicalize_name(name) and re.fullmatch(r"\d[\w.]*", version), f"{name}=={version}"
    extras = PROJECT["project"]["optional-dependencies"]
    (own,) = (line for line in extras["dev"] if Requirement(line).name == "lm-envs")
    installed = [extras[name] for name in ("dev", "docs", *Requirement(own).extras)]
    assert extras.keys() - {"dev", "docs", "triton"} - Requirement(own).extras == {
        "mlflow",
        "pretrained",
        "reasoning",
        "trackio",
        "wandb",
    }
    for line in [*PROJECT["project"]["dependencies"], *(line for extra in installed for line in extra)]:
        requirement = Requirement(line)
        if requirement.name != "lm-envs":
            assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), line
    assert not [name for name in pins() if name.startswith("nvidia")]  # gigabytes, and CI has no GPU


@pytest.mark.parametrize(("name", "oldest"), [("torch", "2.11.0"), ("transformers", "5.17.0")])
def test_the_gpu_machines_versions_are_allowed(name, oldest):
    [requirement] = [Requirement(line) for line in PROJECT["project"]["dependencies"] if Requirement(line).name == name]
    assert requirement.specifier.contains(oldest)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


def make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        if not (cwd / name).exists():
            shutil.copy(CHECKOUT / name, cwd)
    return subprocess.run(["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@needs_make
def test_make_says_which_python_it_wants(tmp_path):
    too_old = make("setup", "PYTHON=false", cwd=tmp_path)  # `false -c ...` fails, as an old Python would
    assert too_old.returncode != 0 and "needs Python 3.11 or newer" in too_old.stderr
    missing = make("test", "PYTHON=no-such-python", cwd=tmp_path)
    assert missing.returncode != 0 and "no no-such-python here" in missing.stderr
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_make_sets_up_once(tmp_path):
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "python").write_text("#!/bin/sh\necho installing $*\n")
    (bin / "python").chmod(0o755)
    assert "installing -m pip install" in make("setup", f"PYTHON={sys.executable}", cwd=tmp_path).stdout
    assert "installing" not in make("setup", f"PYTHON={sys.executable}", cwd=tmp_path).stdout
    os.utime(tmp_path / "constraints.txt", (4e9, 4e9))
    assert "installing" in make("setup", f"PYTHON={sys.executable}", cwd=tmp_path).stdout


@needs_make
def test_make_demo_real_asks_for_a_text(tmp_path):
    ready = tmp_path / ".venv" / ".ready"
    ready.parent.mkdir()
    make("help", cwd=tmp_path)  # copies the files, so that .ready is newer
    ready.touch()
    assert "CORPUS=file.jsonl" in make("demo-real", cwd=tmp_path).stderr
    assert "cannot read nowhere.jsonl" in make("demo-real", "CORPUS=nowhere.jsonl", cwd=tmp_path).stderr
