"""Text environments beside other code of the process: global generators, and children that are forked."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv

from lm_envs import tasks
from lm_envs.env.single import TextBanditEnv, TextEnv
from lm_envs.env.vector import TextVectorEnv
from tests import tiny
from tests.marks import slow_unless


def draws(**options):
    """A loader that takes numbers from torch's global generator, as constructors of models do."""
    torch.rand(3)
    return tiny.task(**options)


@pytest.mark.parametrize("make", [TextEnv, TextBanditEnv, TextVectorEnv, lambda name: tasks.load(name)])
def test_making_an_env_leaves_the_global_generators_alone(make, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "draws", f"{__name__}:draws")
    tasks._loaded.clear()
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    made = make("draws")
    assert torch.equal(before, torch.get_rng_state())
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002
    draws()  # negative control: what was called takes numbers
    assert not torch.equal(before, torch.get_rng_state()) and made is not None


FORKS = """
import multiprocessing, sys
import torch
{imported}

def product():
    x = torch.ones(600, 600)
    return float((x @ x).exp().clamp(max=1).sum())

if __name__ == "__main__":
    torch.set_num_threads(2)
    product()  # starts the threads
    child = multiprocessing.get_context("fork").Process(target=product)
    child.start()
    child.join(15)
    hangs = child.is_alive()
    child.kill()
    print("hangs" if hangs else f"ends with {{child.exitcode}}")
"""


FORKED = [("import lm_envs.env.mdp", "ends with 0"), ("", "hangs")]


@pytest.mark.parametrize(("imported", "said"), slow_unless(lambda case: case[0], FORKED))
def test_a_child_forked_after_threads_were_used_computes(imported, said, tmp_path):
    """The second case is the negative control: plain torch waits for the parent's threads."""
    path = tmp_path / "forks.py"
    path.write_text(textwrap.dedent(FORKS.format(imported=imported)))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == said, done.stderr


def make_tiny():
    return TextEnv(tiny.task(), kl_coef=0.0)


@pytest.mark.parametrize("context", slow_unless("fork".__eq__, ["fork", "spawn", "forkserver"]))
def test_async_vector_envs_step_whatever_starts_their_processes(context):
    rewards = []
    env = AsyncVectorEnv([make_tiny] * 2, context=context)
    try:
        env.reset(seed=0)
        for action in (2, 2, tiny.EOS):
            rewards.append(env.step(np.array([action, 2]))[1].tolist())
    finally:
        env.close()
    assert rewards == [[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]]
