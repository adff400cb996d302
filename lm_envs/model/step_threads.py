"""The number of threads for a forward of one token a row: a small operation may be faster than their start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from lm_envs.kernels.threads import waking_is_slow

# Multiplications of a layer, or of the head, that occupy one thread, by whether waking one is slow.
WORTH = {True: 2**25, False: 2**21}


class StepThreads:
    """The numbers of threads that pay off when a model reads one token a row on a CPU: for its layers, and its head.

    A layer has a dozen small operations, each of which starts all threads; the head has one that can be large. Sizes
    decide, not a timing, which would change runs' numbers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._head: nn.Module = model.get_output_embeddings()
        weight = self._head.weight
        # Embeddings are looked up, not multiplied; the head may share their table.
        apart = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} | {id(weight)}
        weights = {id(p): p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in apart}
        layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 1)
        self._works = sum(weights.values()) // max(layers, 1), weight.numel()  # multiplications for one token

    def of(self, rows: int) -> tuple[int, int]:
        """Return the threads for a layer and for the head."""
        layer, head = (max(1, work * rows // WORTH[waking_is_slow()]) for work in self._works)
        return layer, head

    @contextmanager
    def use(self, rows: int) -> Iterator[None]:
        """Set the threads for forwards that read ``rows`` tokens, never more than torch uses already."""
        every = torch.get_num_threads()
        layer, head = (min(count, every) for count in self.of(rows))
        if layer == head == every:
            yield
            return
        before = self._head.register_forward_pre_hook(lambda *_: torch.set_num_threads(head))
        after = self._head.register_forward_hook(lambda *_: torch.set_num_threads(layer))
        torch.set_num_threads(layer)
        try:
            yield
        finally:
            torch.set_num_threads(every)
            before.remove()
            after.remove()
