"""The tests' own world: no network, no model hub, one thread a process, and a cache of their own.

The environment variables are set before anything imports torch or transformers, and child processes inherit them.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

# What is built once (the C kernels) is kept between runs, here and not in the user's cache.
os.environ["LM_ENVS_CACHE"] = str(CHECKOUT / ".cache" / "tests")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """A connection to another machine fails, so a test that needs one is found."""
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address[0]}: tests use no network")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield
