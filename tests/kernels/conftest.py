"""Triton's kernels run under its interpreter where there is no GPU; that has to be decided before triton is imported,
which other tests may do, so the folder above decides it too.

These tests need torch and pytest only (and hypothesis, and triton for its own): they also run on a machine that lacks
what the rest of lm_envs imports.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec("gymnasium") is None:
    package = types.ModuleType("lm_envs")
    package.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules["lm_envs"] = package
