"""A run knows what it read: the same contents give the same hashes wherever they lie, any other contents do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run import one_run
from lm_envs.benchmarks.run.data_problem import DataSpec
from lm_envs.benchmarks.run.inputs import fingerprints
from lm_envs.benchmarks.run.one_run import check_same, execute
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from tests.benchmarks.fake_task import NAME
from tests.lm_envs import byo

REWARD = "def f(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture
def brought(tmp_path, monkeypatch) -> Path:
    """A model, a reward's file, prompts and a task of one's own."""
    tokenizer = byo.byte_level_bpe()
    for name in ("policy", "judge"):
        byo.llama(len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "my_reward.py").write_text(REWARD)
    (tmp_path / "hashed_task.py").write_text("load = None\n")
    byo.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"a cat {i}"} for i in range(3)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def scaled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.3 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def edited(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


def custom(task: str = "custom", **options: object) -> RunSpec:
    options = {"policy": "policy", "prompts": "prompts.jsonl", "reward": ["my_reward.py:f*2 + bleu"], **options}
    return RunSpec(task, "ppo", 0, Plan(1), options=options)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda root: scaled(root / "policy"), "policy 'policy'"),
        (lambda root: edited(root / "policy/tokenizer.json"), "policy 'policy'"),
        (lambda root: edited(root / "policy/config.json"), "policy 'policy'"),
        (lambda root: scaled(root / "judge"), "judge 'judge'"),
        (lambda root: edited(root / "prompts.jsonl"), "prompts 'prompts.jsonl'"),
        (lambda root: edited(root / "my_reward.py"), "reward 'my_reward.py'"),
        (lambda root: edited(root / "hashed_task.py"), "task 'hashed_task'"),
        (lambda root: (root / "prompts.jsonl").unlink(), "prompts 'prompts.jsonl'"),
    ],
)
def test_each_input_has_a_hash_of_its_contents(brought, change, name):
    spec = custom("hashed_task:load" if "task" in name else "custom", judge="judge")
    before = fingerprints(spec)
    assert name in before and fingerprints(spec) == before
    (brought / "policy/README.md").write_text("notes")  # which is no part of the model
    assert fingerprints(spec) == before
    change(brought)
    after = fingerprints(spec) if (brought / "prompts.jsonl").exists() else {**before, name: None}
    assert {key for key in before if after.get(key) != before[key]} == {name}


def test_adapters_have_the_hash_of_their_base_too(brought):
    adapters = brought / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(brought / "policy")})
    )
    save_file({"a": torch.zeros(1)}, adapters / "adapter_model.safetensors")
    before = fingerprints(custom(policy="adapters"))["policy 'adapters'"]
    scaled(brought / "policy")
    assert fingerprints(custom(policy="adapters"))["policy 'adapters'"] != before


def test_the_folder_of_a_built_task_has_a_hash_of_its_contents(tmp_path):
    """`lm-envs build` may have written another variant to the same folder meanwhile."""
    (tmp_path / "noisy").mkdir()
    file = tmp_path / "noisy" / "task.json"
    file.write_text("{}")
    spec = RunSpec("reviews", "ppo", 0, Plan(1), options={"path": str(tmp_path / "noisy")})
    before = fingerprints(spec)
    edited(file)
    assert list(before) == [f"path {str(tmp_path / 'noisy')!r}"] and fingerprints(spec).keys() == before.keys()
    assert fingerprints(spec) != before


def test_contents_count_and_not_places(brought):
    shutil.copytree("policy", "again")
    shutil.copy("prompts.jsonl", "rows.jsonl")
    found = (
        fingerprints(DataSpec("sft", "policy", "prompts.jsonl")),
        fingerprints(DataSpec("sft", "again", "rows.jsonl")),
    )
    assert list(found[0]) == ["data 'prompts.jsonl'", "model 'policy'"] and list(found[0].values()) == list(
        found[1].values()
    )


@pytest.fixture
def begun(tmp_path) -> tuple[RunSpec, Path]:
    """A finished run that reads a file."""
    file = tmp_path / "mark.txt"
    file.write_text("a")
    spec = RunSpec(NAME, "sft", 0, Plan(test_prompts=4), options={"mark": str(file)})
    execute(spec, tmp_path / "out")
    return spec, tmp_path / "out" / spec.label


def test_changed_inputs_are_refused_and_other_versions_told_once(begun, monkeypatch, recwarn):
    spec, folder = begun
    assert check_same(spec, folder)["inputs"]
    assert not recwarn.list
    monkeypatch.setattr(
        one_run, "versions", lambda: {**json.loads((folder / "config.json").read_text())["versions"], "torch": "0"}
    )
    with pytest.warns(UserWarning, match="other versions, so numbers may differ .torch: .* before, '0' now."):
        check_same(spec, folder)
    Path(spec.options["mark"]).write_text("b")
    with pytest.raises(UserError, match=r"began with other contents of mark '.*mark.txt': restore them"):
        execute(spec, folder.parents[2])


def test_a_run_without_its_config_is_refused(begun):
    spec, folder = begun
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json: restore it"):
        execute(spec, folder.parents[2])
