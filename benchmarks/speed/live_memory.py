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

    def stop(self, lasting: bool = True) -> int:
        """Bytes that tensors made since :meth:`start` held at the most.

        Args:
            lasting: count those that are still there too, such as gradients; on CUDA they always count.
        """
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() - self._before
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
        changes = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
        changes = [event["args"] for event in sorted(changes, key=lambda e: e["ts"])]
        still: dict[int, int] = {}  # by address, which change allocated it
        for number, change in enumerate(changes):
            still.pop(change["Addr"], None)
            if change["Bytes"] > 0:
                still[change["Addr"]] = number
        left_out = set() if lasting else set(still.values())
        held = most = 0
        for number, change in enumerate(changes):
            held += 0 if number in left_out else change["Bytes"]
            most = max(most, held)
        return most
