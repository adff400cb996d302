"""--reward on the command line and in suites, from the words to the trained run."""

from __future__ import annotations

import json
import re

import pytest

from lm_envs.benchmarks.cli import main
from tests.lm_envs import byo

pytest.importorskip("sacrebleu", reason="sacreBLEU is not installed: pip install 'lm-envs[metrics]'")

ENV = ["--env", "max_new_tokens=4"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    made = byo.make(tmp_path_factory.mktemp("own"))
    rows = [{"prompt": text[:-2], "reference": "fish bird"} for text in byo.TEXTS]
    byo.write_jsonl(made.root / "prompts.jsonl", rows)
    (made.root / "mine.py").write_text(
        "def spaces(completions, **kwargs):\n    return [float(t.count(' ')) for t in completions]\n"
    )
    return made


def parts(own) -> list[str]:
    return ["--policy", own.options["policy"], "--prompts", own.options["prompts"]]


def result(out, algorithm):
    folder = out / "custom" / algorithm / "seed-0"
    return json.loads((folder / "result.json").read_text()), json.loads((folder / "config.json").read_text())


def test_train_by_several_rewards(own, tmp_path):
    rewards = [
        "bleu*0.5",
        f"clip({own.root}/mine.py:spaces, 0, 2)",
        f"standardise(model:{own.root}/reward_model, 0, 5)",
    ]
    main(
        ["train", "--algorithm", "reinforce", "--task", "custom", *parts(own), "--judge", "bleu", "--iterations", "1"]
        + [word for text in rewards for word in ("--reward", text)]
        + ["--set", "episodes=8", "--threads", "1", "--out", str(tmp_path / "out"), *ENV]
    )
    found, config = result(tmp_path / "out", "reinforce")
    assert config["run"]["options"]["reward"] == rewards
    assert found["gold"] is not None and found["win_rate"] is not None  # by the judge
    assert 0 <= found["corpus"] <= 100


def test_a_suite_says_the_same(own, tmp_path):
    suite = tmp_path / "s.toml"
    suite.write_text(f"""
tasks = ["custom"]
algorithms = ["sft"]
[task.custom]
max_new_tokens = 4
[task.custom.options]
policy = {json.dumps(own.options["policy"])}
prompts = {json.dumps(own.options["prompts"])}
reward = ["bleu*0.5", "{own.root}/mine.py:spaces"]
judge = "chrf"
""")
    main(["compare", "--suite", str(suite), "--threads", "1", "--out", str(tmp_path / "out")])
    found, _ = result(tmp_path / "out", "sft")
    assert found["proxy"] >= 0 and 0 <= found["gold"] <= 1 and "corpus" in found
    assert "corpus" in (tmp_path / "out" / "results.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "blue"], "reward 'blue': did you mean 'bleu'"),
        (["--reward", "bleu", "--reward-model", "DIR"], r"beside others write --reward 'standardise\(model:DIR\)'"),
        (["--reward", "nowhere.py:f"], "there is no file 'nowhere.py'"),
        (["--reward", "bleu", "--judge", "clip(bleu, 1)"], "clip takes low, high"),
        ([], "missing: --reward-model"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_made(own, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *parts(own), *words, "--algorithms", "sft", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and re.search(message, said) and "Traceback" not in said
    assert not (tmp_path / "out").exists()
