"""The command line: what it makes, and that every mistake is one clear line before anything has trained."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm_envs.algos.registry import make_config
from lm_envs.benchmarks import errors
from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.commands.compare import Compare
from lm_envs.benchmarks.commands.options import Ends, Own
from lm_envs.benchmarks.run import storage
from lm_envs.benchmarks.run.results import COLUMNS, COSTS
from lm_envs.benchmarks.run.storage import Records
from lm_envs.benchmarks.run.suite_files import load_suite, parse_suite
from lm_envs.tasks import load
from tests.benchmarks.fake_task import NAME
from tests.house import CHECKOUT
from tests.lm_envs import byo

SMALL = ["--test-prompts", "6", "--threads", "1"]


def run(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and what was said on standard error."""
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def refused(capsys, *arguments: str, status: int = 1) -> str:
    """The one line that a refusal says."""
    got, said = run(capsys, *arguments)
    assert got == status
    lines = [line for line in said.splitlines() if line.startswith("lm-envs: ")]
    assert len(lines) == 1 and "Traceback" not in said
    return lines[0]


@pytest.fixture
def suite(tmp_path) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(f"""
name = "small"
tasks = ["{NAME}", "{NAME}-bandit"]
algorithms = ["sft", "best-of-4", "ppo"]
seeds = [0, 1]
budget = {{ episodes = 30 }}
evaluation = {{ test_prompts = 6, validation_prompts = 4, every = 1 }}
[algorithm.ppo]
episodes = 16
[task."{NAME}-bandit"]
algorithms = ["ppo"]
""")
    return path


def test_a_comparison_in_two_processes_from_suite_to_report(tmp_path, suite, capsys):
    out = tmp_path / "out"
    assert run(capsys, "compare", "--suite", suite, "--out", out, "--jobs", "2")[0] == 0
    with open(out / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*COLUMNS, *COSTS, "perplexity", "kl_bound"]
    assert [(row["task"], row["algorithm"], row["seed"]) for row in rows] == [
        *((NAME, algorithm, seed) for algorithm in ("sft", "best-of-4", "ppo") for seed in "01"),
        *((f"{NAME}-bandit", "ppo", seed) for seed in "01"),
    ]
    by_name = {(row["task"], row["algorithm"]): row for row in rows}
    assert all(row[name] for row in rows for name in COLUMNS)
    assert int(by_name[NAME, "ppo"]["reward_calls"]) == 32  # 30 episodes are two whole iterations of 16
    assert int(by_name[NAME, "best-of-4"]["reward_calls"]) == 24 and int(by_name[NAME, "sft"]["reward_calls"]) == 0
    assert {row["seed"]: row["gold"] for row in rows if row["algorithm"] == "sft"}.keys() == {"0", "1"}
    assert (out / "report.html").stat().st_size > 50_000
    folder = next((out).glob("*load/ppo/seed-0"))
    made = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "tensorboard", "result.json"} <= made
    config = json.loads((folder / "config.json").read_text())
    assert config["agent"]["iterations"] == 2 and config["agent"]["episodes"] == 16 and "torch" in config["versions"]

    before = (out / "results.csv").read_text()
    assert "holds the comparison 'small' already: --resume continues it" in refused(
        capsys, "compare", "--suite", suite, "--out", out
    )
    # One process, one more seed: what is finished stays, and what is new does not depend on the number of processes.
    longer = tmp_path / "longer.toml"
    longer.write_text(suite.read_text().replace("[0, 1]", "[0, 1, 2]"))
    assert run(capsys, "compare", "--suite", longer, "--out", out, "--resume")[0] == 0
    after = (out / "results.csv").read_text()
    assert set(before.splitlines()) < set(after.splitlines()) and len(after.splitlines()) == 1 + 12
    changed = tmp_path / "changed.toml"
    changed.write_text(suite.read_text().replace("episodes = 16", "episodes = 8"))
    said = refused(capsys, "compare", "--suite", changed, "--out", out, "--resume")
    assert "overrides.episodes: 16 before, 8 now" in said and "another --out" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "review", "--algorithms", "ppo"], "no task 'review': did you mean 'reviews'"),
        (["--task", "reviews", "--algorithms", "poo"], "no algorithm 'poo': did you mean .*'ppo'"),
        (["--task", "CartPol-v1", "--algorithms", "ppo"], "CartPol"),
        (["--task", "reviews-bandit"], "say which --algorithms"),
        (["--task", "reviews", "--algorithms", "bestof-4"], "did you mean 'best-of-4'"),
        (["--task", "reviews", "--algorithms", "best-of-0"], "needs a whole number n from 1 to 99999"),
        (
            ["--task", "reviews", "--algorithms", "sft", "--set", "ppo.clip=0.1"],
            "--set ppo.clip: 'ppo' is not run here",
        ),
        (["--task", "reviews", "--env", "kl_cof=0.1"], "--env has no option 'kl_cof': did you mean 'kl_coef'"),
        (["--task", "os:getcwd", "--algorithms", "ppo"], "task 'os:getcwd' gave a str"),
        (["--task", "CartPole-v1"], "say which --algorithms"),
        (["--task", "reviews", "--set", "ppo.top_p=0.9"], "ppo.top_p: .* the support they leave moves with the policy"),
        (["--corpus", "nowhere.jsonl"], "no such file or folder: 'nowhere.jsonl'"),
        (["--algorithms", "ppo"], "say what to compare"),
        (["--suite", "dmeo"], "no suite 'dmeo'.*did you mean 'demo'"),
        (["--suite", "demo", "--task", "reviews"], "exclude each other"),
        (["--task", "reviews", "--algorithms", "ppo", "--set", "clip=1"], "algorithm.name=value"),
        (["--task", "reviews", "--algorithms", "ppo", "--set", "ppo.clop=1"], "did you mean 'clip'"),
        (["--task", "reviews", "--algorithms", "ppo", "--set", "ppo.clip=wide"], "must be a number, not 'wide'"),
        (["--task", "reviews", "--algorithms", "sft", "--set", "sft.episodes=3"], "sft is not trained"),
        (["--task", "reviews", "--algorithms", "ppo", "--iterations", "0"], "at least 1"),
        (["--suite", "demo-real"], "task 'corpus' needs --corpus FILE.jsonl"),
        (["--suite", "demo-real", "--corpus", "nowhere.jsonl"], "no such file or folder: 'nowhere.jsonl'"),
        (["--policy", "here", "--algorithms", "ppo"], "missing: --prompts, --reward-model or --reward"),
        (["--task", "nomodule:load", "--algorithms", "ppo"], "no module 'nomodule'"),
        (["--task", "reviews", "--algorithms", "ppo", "none.py:X"], "none.py:X: there is no file 'none.py'"),
        (["--task", "reviews", "--algorithms", "tests.tiny:task"], "is not a subclass of .*Agent"),
        (["--task", "tests.tiny:nope", "--algorithms", "ppo"], "tests.tiny:nope: that name does not exist"),
        (["--task", f"{NAME}-bandit", "--algorithms", "sft"], "no bandit env"),
        (["--task", "CartPole-v1", "--algorithms", "best-of-4"], "is for text"),
    ],
)
def test_a_bad_request_is_one_line_and_leaves_no_run(tmp_path, capsys, arguments, message):
    said = refused(capsys, "compare", *arguments, "--out", tmp_path / "out")
    assert re.search(message, said)
    assert not (tmp_path / "out").exists()


def test_malformed_toml_names_file_and_line(tmp_path, capsys):
    (tmp_path / "s.toml").write_text('tasks = ["reviews"]\nalgorithms = ["ppo"\nseeds = [0]\n')
    said = refused(capsys, "compare", "--suite", tmp_path / "s.toml", "--out", tmp_path / "out")
    assert f"{tmp_path}/s.toml, line 3: not TOML" in said


@pytest.mark.parametrize("where", ["file", "file/inside", "/proc/nowhere"])
def test_an_unwritable_folder_is_found_before_anything_trains(tmp_path, capsys, monkeypatch, where):
    monkeypatch.setattr("lm_envs.benchmarks.run.compare.prepare", lambda runs: pytest.fail("too late"))
    (tmp_path / "file").touch()
    said = refused(capsys, "compare", "--task", NAME, "--algorithms", "ppo", "--out", tmp_path / where)
    assert "cannot write results to" in said and "--out" in said


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    said = refused(capsys, "compare", "--task", NAME, "--algorithms", "ppo", "--out", tmp_path)
    assert "holds 'thesis.tex'" in said and "another folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "env", "message"),
    [
        ("broken = true", "", "returned nan"),
        ("", "max_new_tokens = 100", "more than the model's context of 64"),
        ("nonsense = 1", "", "unexpected keyword argument 'nonsense'"),
    ],
)
def test_a_broken_task_is_found_before_anything_trains(tmp_path, capsys, options, env, message):
    path = tmp_path / "s.toml"
    path.write_text(f"""
tasks = ["{NAME}"]
algorithms = ["ppo"]
[task."{NAME}"]
options = {{ {options} }}
{env}
""")
    assert message in refused(capsys, "compare", "--suite", path, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/*/*"))


def test_a_full_disk_is_one_line_and_the_run_goes_on_from_its_checkpoint(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("lm_envs.benchmarks.commands.report.show", lambda out: None)
    request = ["compare", "--task", NAME, "--algorithms", "a2c", "--iterations", "30", "--set", "a2c.episodes=4"]
    request += [*SMALL, "--out", out]
    write, saved = storage.write_manifest, []

    def full(folder: Path, parts: dict, *more: object) -> None:
        saved.append(parts)
        if len(saved) > 1:  # the second checkpoint does not fit
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        write(folder, parts, *more)

    with monkeypatch.context() as small_disk:
        small_disk.setattr(storage, "write_manifest", full)
        said = refused(capsys, *request)
    assert "No space left on device" in said and "--resume" in said and "checkpoint-000030" in said
    folder = next(out.glob("*/a2c/seed-0"))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-000020"]
    status, said = run(capsys, *request, "--resume")
    assert status == 0 and "continuing after iteration 20" in said
    assert [r["iteration"] for r in Records(folder / "metrics.jsonl").read()] == list(range(31))


def test_one_failed_run_does_not_take_the_others_along(tmp_path, capsys):
    out = tmp_path / "out"
    said = refused(
        capsys, "compare", "--task", NAME, "--algorithms", "ppo", "reinforce", "sft", "--iterations", "1", *SMALL,
        "--set", "ppo.entropy_coef=1e39", "--set", "ppo.episodes=8", "--set", "reinforce.episodes=8", "--out", out,
    )  # fmt: skip
    assert "ppo/seed-0" in said and "ppo: " in said and "lower learning_rate" in said
    lines = (out / "results.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ["reinforce", "sft"]
    assert (out / "report.html").exists()


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    def bug(*arguments, **options):
        raise ValueError("from inside a library")

    monkeypatch.setattr("lm_envs.benchmarks.measure.samples.rollout", bug)
    with pytest.raises(ValueError, match="from inside a library"):
        main(["compare", "--task", NAME, "--algorithms", "ppo", "--out", str(tmp_path / "out")])


def test_which_errors_are_explained():
    assert errors.explain(OSError(errno.ENOSPC, "full", "x")) == (
        "cannot use 'x': full; free some space, then continue with --resume"
    )
    assert errors.explain(FileNotFoundError(errno.ENOENT, "gone", "x")) == "no such file or folder: 'x'"
    assert errors.explain(OSError(errno.ECHILD, "odd")) is None
    assert errors.explain(KeyError("x")) is None
    assert errors.explain(ValueError("never raised")) is None


def test_train_on_a_control_environment(tmp_path, capsys):
    out = tmp_path / "out"
    status, said = run(
        capsys, "train", "--task", "CartPole-v1", "--algorithm", "reinforce", "--iterations", "2", "--out", out,
        "--validate-every", "1", "--set", "learning_rate=1e-2", "--threads", "1",
    )  # fmt: skip
    assert status == 0, said
    row = next(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert row["task"] == "CartPole-v1" and float(row["proxy"]) > 8 and row["gold"] == row["kl"] == ""
    config = json.loads((out / "CartPole-v1/reinforce/seed-0/config.json").read_text())
    assert config["agent"]["learning_rate"] == 1e-2 and config["agent"]["baseline"] == "value"
    assert "proxy is the return" in " ".join((out / "report.html").read_text().split())


def test_help_and_listing_are_worth_reading(capsys):
    for words, expected in (
        (["--help"], ["compare", "train", "tasks", "report", "lm-envs compare --suite demo"]),
        (["compare", "--help"], ["--suite", "--resume", "--corpus", "--reward-model", "--jobs", "Ctrl-C"]),
        (["train", "--help"], ["--set", "CartPole-v1"]),
        (["tasks"], ["reviews", "best-of-<n>", "expert-iteration", "ppo", "demo"]),
        (["--version"], ["lm-envs 0"]),
    ):
        try:
            main(words)
        except SystemExit as stop:
            assert stop.code == 0
        said = capsys.readouterr().out
        assert all(word in said for word in expected), words


def test_help_is_quick_and_needs_no_torch():
    code = "import sys; from lm_envs.benchmarks import cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0


def test_without_algorithms_a_text_task_gets_the_demos(tmp_path):
    demo, real = load_suite("demo"), load_suite("demo-real")
    suite = Compare(out=Path("out"), task=("reviews",)).to_suite()
    assert suite.algorithms == demo.algorithms and suite.overrides == demo.overrides and suite.plan == demo.plan
    assert [task.name for task in suite.tasks] == ["reviews"]
    corpus = tmp_path / "mine.jsonl"
    corpus.touch()
    suite = Compare(out=Path("out"), own=Own(corpus=corpus)).to_suite()
    assert suite.overrides == real.overrides and [task.name for task in suite.tasks] == ["corpus"]


def test_sources_on_the_command_line_come_before_those_of_a_suite(tmp_path):
    for name in ("asked.jsonl", "held.jsonl"):
        (tmp_path / name).touch()
    suite = tmp_path / "suite.toml"
    held = json.dumps(str(tmp_path / "held.jsonl"))
    suite.write_text(
        f'tasks = ["corpus"]\nalgorithms = ["sft"]\n[task.corpus]\noptions = {{path = {held}, seed = 3}}\n'
    )
    asked = Compare(out=Path("out"), suite=str(suite), own=Own(corpus=tmp_path / "asked.jsonl")).to_suite()
    assert asked.tasks[0].options == {"path": str(tmp_path / "asked.jsonl"), "seed": 3}


def test_a_reader_that_goes_away_is_no_traceback():
    command = [sys.executable, "-m", "lm_envs.benchmarks.cli", "compare", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1 and said == b""


def test_help_breaks_lines_where_the_terminal_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")

    def told(*words: str) -> str:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        return capsys.readouterr().out

    for command in ("compare", "train", "overoptimise"):
        text = told(command)
        assert '"label" (0 or 1), and optionally "split".' in text and "default: None" not in text
        assert "\n  lm-envs " in text and "\n\n\n" not in text
    assert "`lm-envs data check` says what it holds." in told("sft") and "(default: 0.05)" in told("sft")
    assert "usage: lm-envs data check [-h]" in told("data", "check")
    whole = told()
    assert "--suite demo --out runs/demo" not in whole.partition("subcommands")[2] and "plots and a report." in whole


def test_env_options_reach_text_tasks_and_algorithms_count_once():
    asked = Compare(out=Path("out"), task=("reviews", "CartPole-v1"), algorithms=("ppo", "ppo"), env=("kl_coef=0.2",))
    runs = asked.to_suite().runs()
    assert [(run.task, run.env) for run in runs] == [("reviews", {"kl_coef": 0.2}), ("CartPole-v1", {})]


def test_a_round_is_no_larger_than_the_budget():
    from lm_envs.benchmarks.run.problems import open_problem

    asked = Compare(out=Path("out"), task=(NAME,), algorithms=("ppo", "expert-iteration"), ends=Ends(episodes=20))
    for run in asked.to_suite().runs():
        config = open_problem(run).agent.config
        assert config.iterations == 1 and config.episodes == {"ppo": 20, "expert-iteration": 24}[run.algorithm]


def test_how_models_are_loaded_is_said_on_the_command_line_and_in_suites(tmp_path, capsys):
    folders = byo.make(tmp_path)
    given = [part for name, value in folders.options.items() for part in (f"--{name.replace('_', '-')}", value)]
    common = ["compare", *given, *SMALL, "--algorithms", "sft", "--env", "max_new_tokens=4"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "cut\n' + (tmp_path / "prompts.jsonl").read_text())
    assert "prompts.jsonl, line 1: not JSON" in refused(capsys, *common, "--out", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    common += ["--bad", "skip"]
    with pytest.warns(UserWarning, match=r"prompts.jsonl: 1 bad row was passed over \(line 1: not JSON"):
        assert run(capsys, *common, "--out", tmp_path / "out", "--dtype", "bfloat16", "--device-map", "cpu")[0] == 0
    settings = json.loads((tmp_path / "out/custom/sft/seed-0/config.json").read_text())["run"]["options"]
    assert settings == {**folders.options, "dtype": "bfloat16", "device_map": "cpu", "bad": "skip"}
    for wrong, message in (
        (["--dtype", "int4"], "dtype must be one of float32"),
        (["--device", "cpu", "--device-map", "cpu"], "exclude each other"),
        (["--reference", "base"], "reference 'base' is the model under"),
    ):
        assert message in refused(capsys, *common, "--out", tmp_path / "wrong", *wrong)
    options = ", ".join(f'{name} = "{value}"' for name, value in folders.options.items())
    options += ', dtype = "bfloat16", bad = "skip"'
    text = f'tasks = ["custom"]\nalgorithms = ["sft"]\n[task.custom]\noptions = {{{options}}}'
    suite = parse_suite(text, "x")
    with pytest.warns(UserWarning, match="1 bad row was passed over"):
        assert load("custom", **suite.runs()[0].options).reference.dtype == torch.bfloat16


def test_what_a_killed_first_write_left_does_not_block_the_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".tmp-123-abc-comparison.json").write_text("{")
    words = ["compare", "--task", NAME, "--algorithms", "sft", "--seeds", "0", *SMALL, "--out", str(out)]
    main(words)
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [
        f".tmp-{gone.pid}-abc-comparison.json",
        f"plots/.tmp-{gone.pid}-abc-x.png",
        f".tmp-{10**12}-abc-results.csv",
    ]
    living = [f".tmp-{os.getpid()}-abc-results.csv", ".tmp-mine"]
    for name in (*left, *living):
        (out / name).write_text("{")
    main([*words, "--resume"])
    assert not [name for name in left if (out / name).exists()] and all((out / name).exists() for name in living)


@pytest.mark.slow
def test_threads_do_not_depend_on_jobs(tmp_path):
    command = ["compare", "--task", NAME, "--algorithms", "sft", "best-of-2", "--seeds", "0", "--test-prompts", "6"]
    for jobs in ("1", "2"):
        main([*command, "--jobs", jobs, "--out", str(tmp_path / jobs)])
        configs = list((tmp_path / jobs).rglob("config.json"))
        assert len(configs) == 2 and {json.loads(path.read_text())["threads"] for path in configs} == {1}


def test_names_and_folders_are_printed_as_they_are(tmp_path, capsys):
    """rich would take brackets for markup, and raise at [/], and make a picture of :x:."""
    out = tmp_path / "out [/red] [bold] :x:"
    suite = tmp_path / "suite.toml"
    lines = ['name = "[/] :x: [red]a"', 'description = "b [/] :smile:"', f'tasks = ["{NAME}"]', 'algorithms = ["sft"]']
    suite.write_text("\n".join([*lines, "[evaluation]", "test_prompts = 6"]))
    main(["compare", "--suite", str(suite), "--out", str(out)])
    shown = capsys.readouterr()
    assert str(out / "results.csv") in shown.out.replace("\n", "")
    assert "[/] :x: [red]a" in shown.err and "b [/] :smile:" in shown.err


def test_tasks_says_what_a_name_is_and_takes(capsys, tmp_path, monkeypatch):
    def said(*names: str) -> str:
        main(["tasks", *names])
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    monkeypatch.setenv("COLUMNS", "200")
    ppo = said("ppo")
    assert "Settings of ppo" in ppo and "clipped objective" in ppo
    assert f"learning_rate {make_config('ppo').learning_rate} Adam's step size at the start." in ppo
    assert "loss_mean minibatch What has the same weight in the loss" in ppo
    assert "One of minibatch, response, token, sum." in ppo and "anneal true Lower" in ppo and "kl_target none" in ppo
    both = said("reviews", "enumerable")
    assert (
        "Make the task of the user's parts." in said("custom")
        and "rewards none" in both
        and "Options of enumerable" in both
    )
    custom = said("custom")
    assert "Options of custom" in custom and "prompts needed a source whose rows have prompt" in custom
    assert "max_new_tokens 32" in custom and "device none where all models go; see" in custom
    assert "vocabulary 4096 the most tokens." in said("corpus") and "path none" in said("translation")
    dialogue = said("dialogue")  # the loader's own options, and those of custom that it leaves open
    assert "ease 0.25 weights of Ease, Flow and Coherence" in dialogue and "max_new_tokens the task's" in dialogue
    assert dialogue.startswith("Replies in a dialogue, with the three rewards")  # what it is, before how it is made
    assert "prompts needed" not in dialogue and "kl_coef 0.05" in dialogue
    assert 'name = "demo"' in said("demo") and "has no settings" in said("best-of-4")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from lm_envs.algos.reinforce import REINFORCE, ReinforceConfig\n"
        "@dataclass\nclass MyConfig(ReinforceConfig):\n"
        '    bonus: float = 0.5\n    """What is\n    added."""\n'
        'class Mine(REINFORCE):\n    """A method of one\'s own."""\n    Config = MyConfig\n'
        "class Bare(REINFORCE):\n    pass\n"
        'def load(size: int = 3):\n    """A task of one\'s own."""\n'
    )
    monkeypatch.chdir(tmp_path)
    own = said("mine.py:Mine")
    assert own.startswith("A method of one's own.") and "bonus 0.5 What is added." in own
    assert said("mine.py:Bare").startswith("Bare has no docstring. Settings of mine.py:Bare")
    assert "A task of one's own. Options of mine.py:load" in said("mine.py:load") and "size 3" in said("mine.py:load")
    for name, advice in (("ppoo", "ppo"), ("revews", "reviews"), ("nothing.py:x", "no file")):
        with pytest.raises(SystemExit):
            main(["tasks", name])
        assert advice in capsys.readouterr().err


def test_a_suite_is_printed_as_it_is(capsys):
    """So that it can begin a file of one's own."""
    main(["tasks", "demo-pretrained"])
    text = (CHECKOUT / "benchmarks" / "suites" / "demo-pretrained.toml").read_text()
    assert capsys.readouterr().out.strip() == text.strip()


@pytest.mark.parametrize("command", ["sft", "dpo", "reward-model"])
def test_one_vocabulary(command, capsys, tmp_path):
    """--model and --policy, --data and --prompts are the same everywhere."""
    for words in (
        [command, "--policy", "none", "--prompts", "none.jsonl"],
        ["train", "--model", "none", "--data", "x"],
    ):
        more = ["--algorithm", "ppo", "--reward", "bleu"] if words[0] == "train" else []
        with pytest.raises(SystemExit):
            main([*words, *more, "--out", str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert "has no option" not in said and "required" not in said


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("train --task reviews --algorithm ppo --clip 0.1", "it is a setting, --set clip=VALUE"),
        ("compare --task reviews --clip=0.1", "it is a setting, --set ALGORITHM.clip=0.1"),
        ("train --task reviews --algorithm ppo --max-new-tokens=8", "the environment, --env max_new_tokens=8"),
        ("compare --task reviews --temperature 0.5", "it is one of the environment, --env temperature=VALUE"),
        ("compare --task reviews --validation-prompts 8", r"a suite has it, as validation_prompts in \[evaluation\]"),
        ("compare --task reviews --reward-calls 8", r"as reward_calls in \[budget\]"),
        ("compare --task reviews --aglorithms ppo", "did you mean '--algorithms'"),
    ],
)
def test_an_unknown_option_points_to_the_right_one(words, advice, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main([*words.split(), "--out", str(tmp_path / "out")])
    assert re.search(advice, capsys.readouterr().err)
