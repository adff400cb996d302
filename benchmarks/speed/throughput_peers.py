"""Other libraries' trainers on the same work: processes in environments of their own, which take turns with ours.

``make peers`` builds the environments under ``.peers/``: two, because TRL's PPO is in its release 1.12 and no longer in
1.16.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_envs.benchmarks.speed.throughput_work import GROUP, Size

HOME = Path(__file__).resolve().parents[2] / ".peers"
WORKER = Path(__file__).with_name("peer_trl.py")
# way: (environment, trainer and epochs for the worker)
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl-1.12 ppo 1 epoch": ("trl-1.12", {"trainer": "ppo", "epochs": 1}),
    "trl-1.12 ppo 4 epochs": ("trl-1.12", {"trainer": "ppo", "epochs": 4}),
    "trl-1.16 grpo": ("trl-1.16", {"trainer": "grpo", "epochs": 1}),
    "trl-1.16 rloo": ("trl-1.16", {"trainer": "rloo", "epochs": 1}),
}
# The peer's way that does the same work as a way of ours. TRL's PPO has a critic of the policy's size; a value head on
# the policy's trunk is less work by design.
RIVALS = {
    "ppo 1 epoch": "trl-1.12 ppo 1 epoch",
    "ppo 4 epochs": "trl-1.12 ppo 4 epochs",
    "ppo 1 epoch, own critic": "trl-1.12 ppo 1 epoch",
    "ppo 4 epochs, own critic": "trl-1.12 ppo 4 epochs",
    "ppo 1 epoch, compiled": "trl-1.12 ppo 1 epoch",
    "grpo": "trl-1.16 grpo",
    "grpo, compiled": "trl-1.16 grpo",
    "rloo": "trl-1.16 rloo",
}


def installed() -> tuple[str, ...]:
    """Return the peers' ways that can be measured here."""
    return tuple(way for way, (where, _) in PEERS.items() if _python(where).exists())


def _python(where: str) -> Path:
    return HOME / where / "bin" / "python"


class Peer:
    """A trainer in a process of its own. Calling it runs one iteration; :meth:`close` ends the process.

    Args:
        way: a key of :data:`PEERS`.
        size: the work.
        device: "cpu" or "cuda".
        threads: torch threads.

    Raises:
        RuntimeError: the process did not start, or ended by itself; the message is its last line.
    """

    def __init__(self, way: str, size: Size, device: str, threads: int) -> None:
        where, trainer = PEERS[way]
        job = trainer | asdict(size) | asdict(size.model) | {"group": GROUP, "device": device, "threads": threads}
        self.way = way
        # Some libraries take no thread count from torch. Nothing is fetched: everything is made here.
        more = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        self._said = tempfile.TemporaryFile(mode="w+")  # a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            [str(_python(where)), str(WORKER), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **more},
        )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            self._said.seek(0)
            words = self._said.read().strip().splitlines() or ["?"]
            raise RuntimeError(f"{self.way!r} ended by itself: {words[-1]}")
        return line

    def ask(self, what: str) -> float:
        """Run one iteration; return its seconds for ``"go"``, the peak of its memory in bytes for ``"peak"``."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def __call__(self) -> None:
        self.ask("go")

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the process has used, from Linux's counters; 0 where there are none."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return 0.0
        fields = stat.read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._said.close()
