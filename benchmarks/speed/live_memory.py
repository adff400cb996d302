"""How much memory tensors hold at the most, by torch's own account: the same each time, as resident memory is not.

It imports nothing of lm-envs, so that other libraries' processes are measured in the same way.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class LiveMemory:
    """From :meth:`start` to :meth:`stop`. What was allocated before does not count, whether or not it is freed.

    Args:
        device: "cpu" or "cuda": where the tensors lie.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def start(self) -> None:
        """Begin to count."""
        if self._device == "cuda":
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stop(self) -> int:
        """Bytes that tensors made since :meth:`start` held at the most."""
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() - self._before
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
        changes = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
        held = most = 0
        for event in sorted(changes, key=lambda e: e["ts"]):
            held += event["args"]["Bytes"]
            most = max(most, held)
        return most
