"""Models, a tokenizer and an account of memory for the benchmarks' processes and other libraries'.

It imports nothing of lm-envs, because other libraries' environments lack it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, PreTrainedTokenizerFast

EOS = 0


def gpt2_config(work: Mapping[str, Any], **more: Any) -> GPT2Config:
    """Make the config of every model: ``layers``, ``width``, ``heads`` and ``vocabulary`` of the work, no dropout."""
    return GPT2Config(
        vocab_size=work["vocabulary"],
        n_embd=work["width"],
        n_layer=work["layers"],
        n_head=work["heads"],
        n_positions=max(128, work["prompt_length"] + work["new_tokens"]),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), EOS),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **more,
    )


def word_tokenizer(vocabulary: int, pad: int = EOS, **more: Any) -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token a word: decoding and encoding again gives the same ids."""
    words = {"<eos>": EOS} | {f"w{i}": i for i in range(1, vocabulary)} | ({} if pad == EOS else {"<pad>": pad})
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"eos_token": "<eos>", "pad_token": "<eos>" if pad == EOS else "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named, **more)


class LiveMemory:
    """The bytes that tensors hold at most, by torch's own account: unlike resident memory, the same each time.

    It counts from :meth:`start` to :meth:`stop`. What was allocated before does not count, whether or not it is freed.

    Args:
        device: "cpu" or "cuda", where the tensors are.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def start(self) -> None:
        """Start counting."""
        if self._device == "cuda":
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stop(self, lasting: bool = True) -> int:
        """Return the most bytes that tensors made since :meth:`start` held.

        Args:
            lasting: also count tensors that still exist, such as gradients; on CUDA they always count.
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
