"""A process of a run on the tiny text task, started with torchrun's variables: `FOLDER NAME ...` writes the weights of
each algorithm after three iterations."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from lm_envs.processes import group
from tests.algos.engine.test_many_processes import learner, run

if __name__ == "__main__":
    torch.set_num_threads(1)
    joined = group.start()
    for name in sys.argv[2:]:
        weights, _, _ = run(*learner(name))
        save_file(weights, Path(sys.argv[1]) / f"{name}-{group.number()}.safetensors")
    group.end()
