"""Whatever a command line or a suite says, it is accepted or refused in one line, before any work."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import typing
import warnings
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lm_envs.algos.policies.adaptation import Adaptation, adapted
from lm_envs.benchmarks.cli import _COMMANDS, main
from lm_envs.benchmarks.commands import learn
from lm_envs.benchmarks.commands.data import DataCheck
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run import compare
from lm_envs.benchmarks.run.storage import Records
from lm_envs.benchmarks.run.suite_files import parse_suite
from lm_envs.benchmarks.speed.settings import SB3, Kernels, Memory, Throughput
from lm_envs.data.sources import read_rows
from lm_envs.model.loading import load_policy
from lm_envs.model.text import Codec
from lm_envs.settings import SettingError, check
from tests.lm_envs import byo

COMMANDS = [*_COMMANDS.values(), Kernels, Throughput, Memory, SB3, DataCheck]
NUMBERS = ["0", "-1", "1", "2", "1.5", "1e3", "1e30", "inf", "nan", "1000000000000", str(2**64), "9" * 5000]
TEXTS = ["", "x", "none", "true", "[" * 3000, "{}", "a=b", "..:x", "\u202e", "\ud800", "best-of-1000000000", "x" * 300]
WORDS = st.sampled_from(NUMBERS + TEXTS) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([2**64, -(2**70)]) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)
QUICK = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def options(kind: type) -> list[tuple[str, Any, Any]]:
    """A command's options with their types, without and with limits; those of the dataclasses in it too."""
    plain, limited = typing.get_type_hints(kind), typing.get_type_hints(kind, include_extras=True)
    found = []
    for name in (field.name for field in dataclasses.fields(kind)):
        inner = dataclasses.is_dataclass(plain[name])
        found += options(plain[name]) if inner else [(name, plain[name], limited[name])]
    return found


def one_line(capsys, words: list[str]) -> None:
    """Run a command that stops where work would begin: it is accepted, or refused without a traceback."""
    begun = mock.patch.object(compare, "prepare", side_effect=UserError("begun"))
    with (
        begun,
        mock.patch.object(learn, "learn_from_data", side_effect=UserError("begun")),
        pytest.raises(SystemExit) as stop,
    ):
        main(words)
    told = capsys.readouterr()
    assert stop.value.code in (0, 1, 2) and "Traceback" not in told.err
    if stop.value.code == 1:
        assert len([line for line in told.err.splitlines() if line.startswith("lm-envs: ")]) == 1, told.err


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_number_of_every_command_has_limits(kind):
    for name, hint, holder in options(kind):
        for type_name, senseless in (("int", -(2**70)), ("float", float("nan"))):
            if type_name in str(hint):
                value = (senseless,) if "tuple" in str(hint) else senseless
                with pytest.raises(SettingError, match=f"^--{name.replace('_', '-')}"):
                    check(dataclasses.make_dataclass("Holder", [(name, holder)])(value))


@QUICK
@given(chosen=st.sampled_from([name for name, *_ in options(_COMMANDS["compare"])]), word=WORDS, more=WORDS)
@example(chosen="threads", word="0", more="x")
@example(chosen="seeds", word=str(2**64), more="x")
@example(chosen="algorithms", word="best-of-1000000000", more="x")
@example(chosen="task", word="..:x", more="x")
@example(chosen="env", word="kl_coef=[1]", more="x")
@example(chosen="set", word="ppo.seed=5", more="x")
@example(chosen="lora_alpha", word="nan", more="x")
def test_compare(capsys, tmp_path, chosen, word, more):
    words = ["compare", "--out", str(tmp_path / "out"), "--algorithms", "ppo", "--task", "reviews"]
    one_line(capsys, [*words, f"--{chosen.replace('_', '-')}", word])


@QUICK
@given(chosen=st.sampled_from([name for name, *_ in options(_COMMANDS["dpo"])]), word=WORDS)
@example(chosen="epochs", word="inf")
@example(chosen="batch_size", word="1000000000000")
@example(chosen="checkpoint_every", word="0")
@example(chosen="seed", word="-1")
def test_stages(capsys, tmp_path, chosen, word):
    words = ["dpo", "--model", "nowhere/at/all/x", "--data", "nowhere.jsonl", "--out", str(tmp_path / "out")]
    with mock.patch("builtins.print"):
        one_line(capsys, [*words, f"--{chosen.replace('_', '-')}", word])


KEYS = {
    "": ("tasks", "algorithms", "name", "description", "seeds", "compile", "budget", "evaluation", "checkpoints", "x"),
    "budget": ("iterations", "episodes", "x"),
    "evaluation": ("test_prompts", "validation_prompts", "every"),
    "checkpoints": ("every",),
    "adaptation": ("freeze_layers", "lora_rank", "lora_alpha", "lora_targets", "lora_merge"),
    "algorithm.ppo": ("learning_rate", "epochs", "seed", "kl_loss", "anneal"),
    "task.reviews": ("algorithms", "kl_coef", "temperature", "max_new_tokens", "missing_eos", "options", "algorithm"),
}


def toml(value: Any) -> str:
    """A value as TOML has it; what it lacks as text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(str(value) if value is None else value)


@settings(QUICK, max_examples=150)
@given(place=st.sampled_from([(table, key) for table, keys in KEYS.items() for key in keys]), value=VALUES)
@example(place=("", "seeds"), value=[-1])
@example(place=("checkpoints", "every"), value=0)
@example(place=("algorithm.ppo", "seed"), value=5)
def test_every_key_of_a_suite(place, value):
    table, key = place
    held = {"": {"tasks": '["reviews"]', "algorithms": '["ppo"]'}} | {table: {} for table in KEYS if table}
    held[table][key] = toml(value)
    text = "".join(
        (f"[{name}]\n" if name else "") + "".join(f"{k} = {v}\n" for k, v in keys.items())
        for name, keys in held.items()
        if keys or not name
    )
    try:
        compare.check_runs(parse_suite(text, "mine.toml").runs())
    except UserError as error:
        assert "\n" not in str(error) or "\n" in str(value)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 100_000, "\ufefftasks = 3", "a = {" * 9000])
def test_suites_that_are_too_deep_or_too_large(text, tmp_path):
    with pytest.raises(UserError) as error:
        parse_suite(text, "mine.toml")
    assert str(error.value).startswith("mine.toml") and len(str(error.value)) < 300


def told(captured, *words: object) -> str:
    """The one line in which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, words)))
    lines = [line for line in captured.readouterr().err.split("\n") if line and not line.startswith("warning: ")]
    assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("lm-envs: ") and lines[0].isprintable()
    return lines[0]


@pytest.mark.parametrize("end", ["jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32"])
def test_wide_text_is_called_that_with_and_without_a_mark(capsys, tmp_path, encoding, end):
    path = tmp_path / f"rows.{end}"
    rows = "prompt,completion\na,b\n" if end == "csv" else '{"prompt": "a", "completion": "b"}\n'
    path.write_text(rows, encoding=encoding)
    line = told(capsys, "data", "check", path)
    assert f"{path}, line 1: this is text in UTF-" in line
    assert encoding.count("-") > 1 or f"in {encoding.upper()}:" in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_devices_do_not_hang_a_command(capsys, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    study = tmp_path / "study"
    study.mkdir()
    os.mkfifo(study / "study.toml")
    out = ["--out", tmp_path / "out"]
    for words in (
        ["data", "check", pipe],
        ["people", "new", *out, "--texts", pipe],
        ["people", "new", *out, "--judged", "/dev/zero"],
        ["people", "results", study],
    ):
        assert "a pipe, a socket or a device" in told(capsys, *words)


def test_files_that_cannot_be_read_to_the_end_are_named(capsys):
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("needs /proc")
    assert "'/proc/self/mem'" in told(capsys, "data", "check", "/proc/self/mem")


def test_strange_places_are_told_in_one_line(capsys, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    deep = "/".join(["y" * 200] * 30)
    for nothing in ("", " ", ":train"):
        assert "names no file" in told(capsys, "data", "check", nothing)
    line = told(capsys, "data", "check", deep)
    assert len(line) < 1100 and line.endswith("File name too long")
    assert "a\\nb.jsonl" in told(
        capsys, "train", "--algorithm", "ppo", "--corpus", "a\nb.jsonl", "--out", tmp_path / "o"
    )
    (tmp_path / "texts.jsonl").write_text('{"prompt": "p", "completions": ["a", "b"]}\n')
    assert str(loop) in told(capsys, "people", "new", "--out", loop, "--texts", tmp_path / "texts.jsonl")
    odd = tmp_path / os.fsdecode(b"a\xff")
    assert "is not UTF-8" in told(capsys, "train", "--task", "reviews", "--algorithm", "ppo", "--out", odd)
    assert not os.path.lexists(odd)


def test_folders_with_a_broken_file_are_told_in_one_line(capfd, tmp_path):
    """The library that reads them logs what is wrong too."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("nope")
    assert "not a data set that can be read" in told(capfd, "data", "check", tmp_path / "rows")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "p", "completions": ["a"]}', "1 completions"),
        ('{"prompt": 5, "completions": ["a", "b"]}', "'prompt' must be a string, not 5"),
        ('{"prompt": {"a": 1}, "completions": ["a", "b"]}', "'prompt' must be a string"),
        ('{"prompt": "p", "completions": "ab"}', "'completions' must be JSON"),
        ('{"prompt": "p", "completions": {"a": 1}}', "'completions' must be a list"),
        ('{"prompt": "p", "completions": [1, 2]}', "'completions' must be a string, not 1"),
        ('{"prompt": "p", "completions": ["a", "b"], "sources": [1, 2]}', "sources must be texts"),
        ('{"prompt": "p", "completions": ["a", "b"], "ranks": [Infinity, 1]}', "ranks whole numbers"),
        ('{"prompt": "p", "completions": ["a", "b"], "ranks": [1]}', "2 completions, 2 sources, 1 ranks"),
        ('{"prompt": "\\ud800", "completions": ["a", "b"]}', "lone surrogate"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_texts_for_people_are_checked_row_by_row(capsys, tmp_path, row, said):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": "p", "completions": ["a", "b"]}\n' * (row[0] == "{") + row)
    line = told(capsys, "people", "new", "--out", tmp_path / "out", "--texts", path)
    assert f"{path}, line {1 + (row[0] == '{')}: " in line and said in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "neither JSON nor JSONL"),
        (
            '[{"data": {"prompt": "a"}, "annotations": [{"result": [{"type": "ranker", "value": {"ranker": {}}}]}]}]',
            "rank",
        ),
        (
            '[{"prompt": [5], "model_a": "a", "model_b": "b", "winner": "tie", "response_a": "x", "response_b": "y"}]',
            "row 1: message 0 of 'prompt'",
        ),
        (
            '[{"prompt": "p", "model_a": "a", "model_b": "b", "winner": "tie", "response_a": "\\ud800"}]',
            "row 1: 'response_a' holds the lone surrogate",
        ),
    ],
)
def test_exports_of_other_tools_are_checked_row_by_row(capsys, tmp_path, text, said):
    path = tmp_path / "export.json"
    path.write_text(text)
    line = told(capsys, "people", "new", "--out", tmp_path / "out", "--judged", path)
    assert str(path) in line and said in line and not (tmp_path / "out").exists()


def test_a_study_that_is_refused_leaves_nothing(capsys, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completions": [str(i) for i in range(100)]}))
    assert "26 responses" in told(capsys, "people", "new", "--out", tmp_path / "o", "--texts", path, "--mode", "rank")
    assert not (tmp_path / "o").exists()


def test_over_optimisation_checks_settings_and_its_folder_before_it_works(capsys, tmp_path):
    words = ["overoptimise", "--task", "tests.algos.batches:learned_task", "--out"]
    with mock.patch("lm_envs.benchmarks.report.overoptimization.measure", side_effect=AssertionError):
        assert "ppo has no setting 'x'" in told(capsys, *words, tmp_path / "o", "--set", "x=1")
        (tmp_path / "file").write_text("")
        assert "it is a file" in told(capsys, *words, tmp_path / "file")
    assert "no task '..:x'" in told(capsys, "overoptimise", "--task", "..:x", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_responses_that_a_policy_cannot_hold_are_refused(capsys, tmp_path):
    tokenizer = byo.byte_level_bpe()
    byo.llama(len(tokenizer)).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    prompts = byo.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}])
    words = ["people", "new", "--policy", tmp_path / "policy", "--prompts", prompts, "--max-new-tokens", "100"]
    capsys.readouterr()
    assert f"reads {byo.CONTEXT} tokens" in told(capsys, *words, "--out", tmp_path / "o")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return byo.make(tmp_path_factory.mktemp("parts")).root


def test_texts_that_are_far_too_long_are_refused_before_they_are_tokenized(capsys, tmp_path, parts):
    rows = byo.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b " * 5000}])
    prompts = byo.write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": "word " * 2000}, {"prompt": "a"}, {"prompt": "b"}]
    )
    out = ["--out", tmp_path / "out"]
    train = ["train", "--algorithm", "ppo", "--policy", parts / "policy", "--reward-model", parts / "reward_model"]
    for words in (
        ["sft", "--model", parts / "policy", "--data", rows, *out],
        [*train, "--prompts", prompts, *out],
        ["people", "new", "--policy", parts / "policy", "--prompts", prompts, *out],
    ):
        with mock.patch.object(Codec, "_ids", side_effect=AssertionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert f"characters, more than the {byo.CONTEXT} tokens that fit can hold" in refused(capsys, *words)
    assert not (tmp_path / "out").exists()


def refused(captured, *words: object) -> str:
    """The line in which a command is refused, whatever it told before."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, words)))
    lines = [line for line in captured.readouterr().err.split("\n") if line.startswith("lm-envs: ")]
    assert stop.value.code == 1 and len(lines) == 1
    return lines[0]


def _stored(change):
    """The weights of a folder, changed."""

    def write(folder):
        held = {name: change(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def _adapters_of_itself(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    base = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(base))


def _configured(**values):
    def write(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return write


@pytest.mark.parametrize(
    ("command", "part", "change", "said"),
    [
        ("sft", "policy", _stored(lambda x: (10 * x).int()), "its weights hold whole numbers (lm_head.weight"),
        ("reward-model", "policy", _stored(lambda x: (10 * x).int()), "its weights hold whole numbers (model"),
        ("reward-model", "reward_model", _stored(lambda x: (10 * x).int()), "its weights hold whole numbers (bert."),
        ("reward-model", "policy", _stored(lambda x: x * float("nan")), "embed_tokens.weight holds NaN or infinity"),
        ("dpo", "policy", _configured(architectures=5), "architectures must be a list of names, not 5"),
        ("dpo", "policy", _adapters_of_itself, "which holds adapters itself"),
    ],
)
def test_models_that_are_broken_are_refused_before_training(capsys, tmp_path, parts, command, part, change, said):
    folder = shutil.copytree(parts / part, tmp_path / "model")
    change(folder)
    pairs = [{"prompt": f"the {i}", "chosen": " ate", "rejected": " hid", "completion": " ate"} for i in range(4)]
    rows = byo.write_jsonl(tmp_path / "rows.jsonl", pairs)
    words = [command, "--model", folder, "--data", rows, "--out", tmp_path / "out", "--threads", 1]
    assert said in refused(capsys, *words) and not (tmp_path / "out").exists()


def test_adapters_in_whole_numbers_are_refused(capsys, tmp_path, parts):
    pytest.importorskip("peft")
    model = adapted(load_policy(parts / "policy"), Adaptation(lora_rank=2))
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "adapter_model.safetensors"
    save_file({name: tensor.int() for name, tensor in load_file(weights).items()}, weights)
    rows = byo.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "the", "completion": " ate"}] * 4)
    words = ["sft", "--model", tmp_path / "model", "--data", rows, "--out", tmp_path / "out", "--threads", 1]
    assert "is stored in whole numbers" in refused(capsys, *words)


def test_weights_that_are_all_0_teach_nothing(capsys, tmp_path, parts):
    rows = [{"prompt": f"the {i}", "chosen": " ate", "rejected": " hid", "trust": 0} for i in range(4)]
    path = byo.write_jsonl(tmp_path / "rows.jsonl", rows)
    words = ["dpo", "--model", parts / "policy", "--data", path, "--out", tmp_path / "out", "--weight", "trust"]
    assert "the weight 'trust' is 0 in all rows" in refused(capsys, *words, "--threads", 1)
    assert not (tmp_path / "out").exists()


def test_names_with_a_nul_character_are_told_in_one_line(capsys, tmp_path):
    suite = tmp_path / "mine.toml"
    suite.write_text('tasks = ["corpus"]\nalgorithms = ["ppo"]\n[task.corpus]\noptions = {path = "a\\u0000b"}\n')
    assert "holds a NUL character" in refused(capsys, "compare", "--suite", suite, "--out", tmp_path / "out")


def test_files_of_another_kind_in_a_folder_are_told(capsys, tmp_path):
    """The library that reads folders takes the files of the commonest kind, and says nothing of the others."""
    byo.write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p"}])
    (tmp_path / "notes.txt").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [row["prompt"] for _, row in read_rows(tmp_path)] == ["p"]
    (tmp_path / "b.csv").write_text("prompt\nq\n")
    with pytest.warns(UserWarning, match="b.csv not read: the files of a folder are of one kind"):
        assert [row["prompt"] for _, row in read_rows(tmp_path)] == ["p"]


@pytest.fixture
def study(tmp_path, capsys):
    texts = byo.write_jsonl(tmp_path / "texts.jsonl", [{"prompt": "p", "completions": ["a", "b"]}])
    main(["people", "new", "--out", str(tmp_path / "study"), "--texts", str(texts)])
    main(["people", "simulate", str(tmp_path / "study"), "--annotators", "2"])
    capsys.readouterr()
    return tmp_path / "study"


def _rewritten(statement: str):
    def change(path):
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute(statement)
            database.commit()

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"noise" * 3000),
        lambda path: os.truncate(path, 5000),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        _rewritten("UPDATE shown SET body = 'nope'"),
        _rewritten("""UPDATE shown SET body = '{"ranks": ["a", 1]}'"""),
        _rewritten("""UPDATE shown SET body = '{"other": 1}'"""),
        _rewritten("UPDATE items SET prompt = 'nope'"),
        _rewritten("DELETE FROM responses"),
    ],
)
def test_a_study_whose_database_is_damaged_is_refused_and_not_begun_again(capsys, study, tmp_path, change):
    change(study / "study.sqlite")
    for words in (["people", "results", study], ["people", "export", study, tmp_path / "answers.jsonl"]):
        assert str(study / "study.sqlite") in told(capsys, *words)
    assert not (tmp_path / "answers.jsonl").exists()


def test_ports_are_checked(capsys, study):
    for port in ("0", "-1", "999999"):
        assert "--port must be at" in told(capsys, "people", "serve", study, "--port", port)


@pytest.mark.parametrize(
    "content", ["[]", '{"task": "reviews"}', '{"task": 5, "algorithm": "ppo", "seed": 0}', "[" * 9000]
)
def test_a_result_that_is_none_is_named_by_the_report(capsys, tmp_path, content):
    path = tmp_path / "reviews" / "ppo" / "seed-0" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert f"{path} is damaged" in told(capsys, "report", tmp_path)


@pytest.mark.parametrize("line", ["5", "[]", "[" * 100_000])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 0}}\n{line}\n')
    with pytest.raises(UserError, match=f"{path}, line 2: "):
        Records(path).read()
