"""Law 8 between real processes, with a copy of the weights on each (ddp) or a share of them (fsdp);
tests/algos/engine/test_many_processes.py checks the former for every algorithm in threads."""

import copy
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model import forwards
from lm_envs.processes import group
from tests import gloo_run, tiny
from tests.house import CHECKOUT


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(world, *words, **environment):
    """The processes of a group, each running a module of the tests."""
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    found = []
    for rank in range(world):
        own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank, **environment}.items()}
        settings = {**os.environ, "PYTHONPATH": str(CHECKOUT), **own}
        command = [sys.executable, "-m", *map(str, words)]
        found.append(subprocess.Popen(command, env=settings, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True))
    return found


def end(processes, timeout=120):
    try:
        return [(process.communicate(timeout=timeout)[1], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def gap(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def compared(folder, world, how, names):
    """By name, the gap between one process and many, and that among the many; the checkpoint's is part of the first."""
    processes = start(world, "tests.gloo_run", folder, how, *names)
    expected = {name: gloo_run.learned(name) for name in names}
    said = end(processes, 400)
    assert [status for _, status in said] == [0] * world, said
    gaps = {}
    for name, (weights, checkpoint) in expected.items():
        found = [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(world)]
        from_one = max(gap(weights, found[0]), gap(checkpoint, load_file(folder / f"{name}-checkpoint.safetensors")))
        gaps[name] = from_one, max(gap(found[0], each) for each in found)
    return gaps


ALL = ("reinforce", "ppo", "grpo", "sft", "dpo", "reward-modelling", "expert-iteration", "rloo")
PARTS = tuple(f"ppo:{variant}" for variant in gloo_run.VARIANTS)


@pytest.mark.parametrize(
    ("world", "how", "names"),
    [
        (2, "fsdp", ("ppo:full-kl",)),
        pytest.param(2, "ddp", ("ppo",), marks=pytest.mark.slow),
        pytest.param(4, "ddp", ALL, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", ALL, marks=pytest.mark.slow),
        pytest.param(2, "ddp", PARTS, marks=pytest.mark.slow),
        pytest.param(2, "fsdp", PARTS, marks=pytest.mark.slow),
    ],
    ids=["2-fsdp", "2-ddp", "4-ddp", "4-fsdp", "2-ddp-variants", "2-fsdp-variants"],
)
def test_processes_are_one(tmp_path, monkeypatch, world, how, names):
    monkeypatch.setitem(forwards.MOST_LOGITS, "cpu", forwards.MOST_LOGITS["cpu"])  # a variant changes it
    for name, (from_one, among) in compared(tmp_path, world, how, names).items():
        assert among == 0, name
        assert from_one < (0.1 if "bfloat16" in name else 1e-9), name  # sums of gradients are rounded there


@pytest.mark.slow
def test_a_mean_of_shares_is_seen(tmp_path):
    """Negative control: what FSDP does by itself."""
    assert compared(tmp_path, 2, "fsdp-mean", ("ppo",))["ppo"][0] > 1e-3


@pytest.mark.slow
def test_what_is_communicated_is_what_docs_say(tmp_path):
    """The formulas of docs/scale.md, for two processes in float64; FSDP pads what it cannot halve."""
    found = {}
    for how in ("ddp", "fsdp"):
        (tmp_path / how).mkdir()
        said = end(start(2, "tests.gloo_run", tmp_path / how, f"{how}-count", "ppo"), 400)
        assert [status for _, status in said] == [0, 0], said
        one, other = (load_file(tmp_path / how / f"ppo-{rank}.safetensors") for rank in range(2))
        assert one == other
        found[how] = {step: int(count) for step, count in one.items()}
    ddp, fsdp = found["ddp"], found["fsdp"]
    assert ddp["the sum of gradients"] == ddp["steps"] * ddp["weights"]
    assert fsdp["forwards"] > fsdp["steps"] == ddp["steps"] > 1
    assert fsdp["scattered"] == pytest.approx(fsdp["forwards"] * fsdp["weights"], rel=0.01)
    twice = fsdp["weights"] + fsdp["layers"]
    assert fsdp["gathered"] == pytest.approx(fsdp["forwards"] * twice, rel=0.01)
    assert fsdp["whole"] == fsdp["weights"] + fsdp["idle"] and "the sum of gradients" not in fsdp
    rows, tokens = gloo_run.SETTINGS["episodes"], 6
    assert 20 * rows * tokens < ddp["the sampled episodes"] <= 40 * rows * tokens


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_group_of_one_is_none(device):
    """Sums and exchanges over gloo, and on a GPU over nccl."""

    def learned():
        model = tiny.gpt2(seed=1).to(device)
        env = TextVectorEnv(tiny.task(reference=model), 8)
        policy = LMPolicy.for_mdp(env.mdp, copy.deepcopy(model).requires_grad_(True))
        agent = make_agent("ppo", policy, episodes=8, learning_rate=1e-2)
        for _ in range(2):
            agent.iteration(env)
        return {name: weight.detach().cpu() for name, weight in policy.named_parameters()}

    processes = group.Processes(0, 1, "127.0.0.1", free_port(), False, False)
    x = torch.ones(2, device=device)
    try:
        with group.sharing(processes):
            found = learned()
            group.add(x, "a test")
            assert group.exchange(x.cpu(), "a test")[0].tolist() == x.tolist() == [1.0, 1.0]
    finally:
        processes.end()
    assert gap(found, learned()) < 1e-9
