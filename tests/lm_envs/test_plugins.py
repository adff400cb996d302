"""What others plug in is found by its text, and each way to fail is one line."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import lm_envs
from lm_envs import plugins, tasks
from lm_envs.algos import registry
from lm_envs.reward.base import call_reward
from lm_envs.reward.building import build_reward
from lm_envs.reward.specs import is_spec, parse_reward
from tests.house import CHECKOUT

PLUGGED = CHECKOUT / "tests" / "plugged"
FILES = ("my_algo.py", "my_task.py", "my_reward.py")
SAMPLES = dict(prompts=["p"], completions=["a b c"], completion_ids=[[1]], finish_reasons=["stop"])


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """A working folder with an algorithm, a task and a reward of one's own; registries are put back."""
    for name in FILES:
        (tmp_path / name).write_text((PLUGGED / name).read_text())
    monkeypatch.chdir(tmp_path)
    kept = [(held, dict(held)) for held in (gymnasium.registry, tasks.TASKS)]
    yield tmp_path
    for held, before in kept:
        held.clear()
        held.update(before)


def test_a_file_is_found_from_the_working_folder_by_its_whole_path_and_by_tilde(mine, monkeypatch):
    found = registry.load("my_algo.py:CISPO")
    assert found.name == "cispo" and registry.load(f"{mine}/my_algo.py:CISPO") is found
    monkeypatch.setenv("HOME", str(mine))
    assert registry.load("~/my_algo.py:CISPO") is found
    assert registry.make_config("my_algo.py:CISPO", clip=1).clip == 1.0  # typed from its Config
    with pytest.raises(ValueError, match=r"my_algo.py:CISPO: clip must be above 0, not -1"):
        registry.make_config("my_algo.py:CISPO", clip=-1)
    with pytest.raises(ValueError, match=r"my_algo.py:CISPO has no setting 'clop': did you mean 'clip'"):
        registry.make_config("my_algo.py:CISPO", clop=1)


def test_a_file_that_changed_is_read_again(mine):
    before = registry.load("my_algo.py:CISPO")
    (mine / "my_algo.py").write_text((PLUGGED / "my_algo.py").read_text().replace("= 0.2", "= 0.4"))
    assert (before.Config().clip, registry.load("my_algo.py:CISPO").Config().clip) == (0.2, 0.4)


def test_a_task_by_its_file_in_load_and_in_gymnasium(mine):
    task = tasks.load("my_task.py:load", prompts=4)
    assert task.name == "brief" and tasks.load("my_task.py:load", prompts=4) is task
    assert call_reward(task.reward, **SAMPLES).tolist() == pytest.approx([-0.3])
    env = gymnasium.make("lm_envs/Reviews-v0", task="my_task.py:load", disable_env_checker=True)
    assert env.unwrapped.task.name == "brief" and env.unwrapped.task.max_new_tokens == 6
    envs = gymnasium.make_vec("lm_envs/ReviewsBandit-v0", num_envs=2, task="my_task.py:load")
    assert envs.single_action_space.shape == (6,)


def brief():
    return tasks.load("my_task.py:load")


@pytest.mark.parametrize("loader", [brief, "my_task.py:load"])
def test_register_task_makes_both_ids_and_the_name(mine, loader):
    lm_envs.register_task("Brief", loader)
    assert tasks.load("brief").name == "brief"
    single = gymnasium.make("lm_envs/Brief-v0", disable_env_checker=True)
    bandit = gymnasium.make("lm_envs/BriefBandit-v0", disable_env_checker=True)
    assert single.unwrapped.task is bandit.unwrapped.task is tasks.load("brief")
    assert isinstance(single.action_space, gymnasium.spaces.Discrete)
    assert isinstance(bandit.action_space, gymnasium.spaces.MultiDiscrete)
    assert np.array_equal(single.reset(seed=1)[0], bandit.reset(seed=1)[0])
    for name in ("Reviews", "no name", "Corpus"):
        with pytest.raises(ValueError, match=f"task {name!r}: choose another name"):
            lm_envs.register_task(name, loader)


@pytest.fixture
def package(mine, monkeypatch):
    """An installed package with entry points."""
    about = mine / "site" / "their_package-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[lm_envs.algorithms]\ntheir-cispo = their_package:CISPO\nbroken = their_package:NOTHING\n"
        "[lm_envs.tasks]\nbrief = their_package:load\n[lm_envs.rewards]\nbrevity = their_package:brevity\n"
    )
    (mine / "site" / "their_package.py").write_text("\n".join((PLUGGED / name).read_text() for name in FILES))
    monkeypatch.syspath_prepend(mine / "site")
    plugins.installed.cache_clear()
    yield
    plugins.installed.cache_clear()
    sys.modules.pop("their_package", None)


def test_entry_points_of_installed_packages(package):
    assert registry.load("their-cispo").name == "cispo"
    assert tasks.load("brief").name == "brief"
    assert is_spec("brevity") and is_spec("brevity + bleu")
    assert call_reward(build_reward(parse_reward("brevity*10")), **SAMPLES).tolist() == pytest.approx([-3.0])
    assert plugins.place_of("their-cispo", "algorithm", registry.ALGORITHMS) == "their_package"
    with pytest.raises(ValueError, match="no algorithm 'their-cipso': did you mean 'their-cispo'"):
        registry.load("their-cipso")
    with pytest.raises(ValueError, match="algorithm broken: that name does not exist"):
        registry.load("broken")
    with pytest.raises(ValueError, match="no task 'breif': did you mean 'brief'"):
        tasks.load("breif")


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (
            "my_alog.py:CISPO",
            "",
            r"my_alog.py:CISPO: there is no file 'my_alog.py': did you mean 'my_algo.py'",
        ),
        ("away/x.py:CISPO", "", r"away/x.py:CISPO: there is no file 'away/x.py': looked in .*/away"),
        ("my_algo.py:CISP", "", r"my_algo.py:CISP: that name does not exist: did you mean .*'CISPO'"),
        ("my_algo.py:masked_mean", "", "that name is not a subclass of lm_envs.algos.engine.agent.Agent: there are"),
        ("no_module:CISPO", "", "there is no module 'no_module' on the import path"),
        ("my_algo:CISPO", "", r"no module 'my_algo' on the import path .*; a file is named my_algo.py:NAME"),
        ("my_algo.CISPO", "", r"no algorithm 'my_algo.CISPO': .*one of your own is FILE.py:NAME or module:NAME"),
        ("my_algo.py", "", r"no algorithm 'my_algo.py': say which of the file's names is meant, as in my_algo.py:NAME"),
        ("x.py:A", "import torch\n\n1 / 0\n", r"x.py, line 3: ZeroDivisionError: division by zero"),
        ("x.py:A", "def f(:\n", r"x.py, line 1: SyntaxError"),
        (
            "x.py:A",
            "from lm_envs.algos.engine.agent import Agent\n\nclass A(Agent):\n    Config = dict\n",
            "algorithm x.py:A: its Config must be a dataclass that inherits from AgentConfig",
        ),
        (
            "x.py:A",
            "from lm_envs.algos.engine.agent import Agent\nfrom lm_envs.algos.engine.config import AgentConfig\n\n"
            "class C(AgentConfig):\n    more: float = 1.0\n\nclass A(Agent):\n    Config = C\n",
            "algorithm x.py:A: C needs @dataclass: 'more' is not a setting yet",
        ),
    ],
)
def test_each_way_to_fail_is_one_line(mine, text, code, message):
    (mine / "x.py").write_text(code)
    with pytest.raises(ValueError, match=message) as caught:
        registry.load(text)
    assert "\n" not in str(caught.value)


def test_a_loader_that_gives_no_task_is_refused(mine):
    with pytest.raises(ValueError, match="task 'os:getcwd' gave a str"):
        tasks.load("os:getcwd")
    with pytest.raises(ValueError, match="options of task 'my_task.py:load': .*'speed'"):
        tasks.load("my_task.py:load", speed=1)
