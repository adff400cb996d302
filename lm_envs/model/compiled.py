"""Optional decoding in fixed shapes, so that ``torch.compile`` makes one program of a step.

Prompts are read into a growing cache, whose columns are then copied to buffers of one size for the program. Finished
rows stay until all have finished.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from lm_envs.kernels.threads import at_most
from lm_envs.model.encoder_decoder import is_encoder_decoder
from lm_envs.model.kv_cache import GrowingLayer, RowCache, can_cache, layer_types, no_rows
from lm_envs.model.step_threads import StepThreads
from lm_envs.model.tokens import names_argument
from lm_envs.printable import first_line

Backend = Literal["inductor", "eager", None]  # "eager" traces and compiles nothing, None does not even trace
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

COLUMNS = 64  # the columns of buffers are a multiple of this
TRIED: Backend = "eager"  # for the trial of a model before its use
_INSTEAD = "do without compile=True (--compile on the command line)"
# Errors of models that expect a cache of transformers' own, or sizes that are numbers.
_FAILURES = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class FixedLayer(StaticLayer):
    """Keys and values of one layer in buffers of fixed place and size; the model's mask handles windows.

    Args:
        like: a layer of the same model that is not empty.
        rows, columns: of the buffers.
        place: ``()`` int64, the column of the next token: one tensor for all layers, which its owner increments.
    """

    def __init__(self, like: GrowingLayer, rows: int, columns: int, place: Tensor) -> None:
        super().__init__(columns)
        self.cumulative_length = place
        self.lazy_initialization(*(x[:1].expand(rows, -1, -1, -1) for x in (like.keys, like.values)))

    def start(self, prompts: GrowingLayer) -> None:
        """Copy another layer's keys and values, which have no more rows and columns."""
        for buffer, x in ((self.keys, prompts.keys), (self.values, prompts.values)):
            buffer.zero_()  # masked values are multiplied by zero, and zero times NaN is NaN
            buffer[: x.shape[0], :, : x.shape[2]] = x

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one column; return the whole buffers."""
        place = self.cumulative_length.view(1)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values


class _Program:
    """A step of a fixed number of rows and columns, with its memory."""

    def __init__(self, model: PreTrainedModel, like: RowCache, rows: int, columns: int, backend: Backend) -> None:
        device = model.device
        self.place = torch.zeros((), dtype=torch.long, device=device)
        self.layers = [FixedLayer(layer, rows, columns, self.place) for layer in like.cache.layers]
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.mask = torch.ones(rows, columns, dtype=torch.bool, device=device)
        self._graphs = device.type == "cuda" and backend == "inductor"
        self._step = step_of(model, Cache(layers=list(self.layers)))
        if backend is not None:
            options: dict[str, Any] = dict(mode="reduce-overhead") if self._graphs else dict(backend=backend)
            self._step = torch.compile(self._step, dynamic=False, fullgraph=True, **options)
        # A layer's number serves the head too: it cannot change inside a program.
        self._threads = StepThreads(model).of(rows)[0]

    def start(self, prompts: RowCache) -> None:
        """Continue these prompts."""
        for layer, held in zip(self.layers, prompts.cache.layers, strict=True):
            layer.start(held)
        count, columns = len(prompts.lengths), torch.arange(self.mask.shape[1], device=self.mask.device)
        self.place.fill_(prompts.columns)
        self.mask[:count] = columns >= (prompts.columns - prompts.lengths).unsqueeze(1)
        self.mask[count:] = True  # unused rows, which read zeros
        self.positions[:count, 0] = prompts.lengths
        self.positions[count:] = 0

    def run(self) -> tuple[Tensor, Tensor]:
        """Logits ``(rows, V)`` and hidden states ``(rows, d)`` after one more token; on CUDA, until the next call."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with at_most(self._threads):
            found = self._step(self.tokens, self.mask, self.positions)
        self.place += 1
        self.positions += 1
        return found


def step_of(model: PreTrainedModel, cache: Cache) -> Step:
    """Return ``step(tokens (B, 1), mask (B, columns), positions (B, 1)) -> logits (B, V), hidden (B, d)``."""
    seen: list[Tensor] = []
    twin = _watched(model, seen)
    placed = names_argument(model, "position_ids")

    def step(tokens: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        more = {"position_ids": positions} if placed else {}
        found = twin(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        return found.logits[:, -1], seen.pop()[:, -1]

    # torch.compile gives up on code that it has compiled eight times, so each program gets its own.
    step.__code__ = step.__code__.replace()
    return step


def _watched(model: PreTrainedModel, seen: list[Tensor]) -> PreTrainedModel:
    """Return the model with a copy of its head that appends its inputs to ``seen``: compiled programs contain hooks, so
    the model's own head may have none."""
    head = model.get_output_embeddings()
    watched = copy.copy(head)
    watched._forward_pre_hooks = OrderedDict()
    watched.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    twin = copy.copy(model)
    twin._modules = {name: watched if child is head else child for name, child in model._modules.items()}
    return twin


class FixedRows:
    """Rows of text that grow by a token a step in fixed shapes, with :class:`~lm_envs.model.kv_cache.RowCache`'s
    methods.

    Reuse one object: programs see in-place changes of the model's weights. One is compiled for each number of rows,
    rounded up by :func:`rounded`, and of columns, rounded up to :data:`COLUMNS`.

    Args:
        model: one that :func:`check_compilable` accepts.
        room: the most tokens that a row grows by.
        backend: torch.compile's; on CUDA "inductor" records CUDA graphs.
    """

    hidden: Tensor  # (n, d) hidden states behind the logits of the last :meth:`advance`

    def __init__(self, model: PreTrainedModel, room: int, backend: Backend = "inductor") -> None:
        self.model, self._room, self._backend = model, room, backend
        self._programs: dict[tuple[int, int], _Program] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedRows:
        """Copy without the programs, which read the original's weights."""
        return FixedRows(copy.deepcopy(self.model, memo), self._room, self._backend)

    @torch.no_grad()
    def prefill(self, prompts: Tensor) -> Tensor:
        """Restart all rows with prompts ``(n, P)``, left-padded with -1; return logits ``(n, V)``."""
        held = RowCache(self.model)
        logits = held.prefill(prompts)
        count, width = prompts.shape
        # The size depends on the places of prompts, not on their lengths, so that programs are reused.
        size = rounded(count), -(-(width + self._room) // COLUMNS) * COLUMNS
        if size not in self._programs:
            self._programs[size] = _Program(self.model, held, *size, self._backend)
        self._program = self._programs[size]
        self._program.start(held)
        self._active = torch.arange(count, device=prompts.device)
        return logits

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> Tensor:
        """Add a token, ``(n,)``, to each row that was kept; return logits ``(n, V)``."""
        self._program.tokens[self._active, 0] = tokens
        # Copies: the memory of CUDA graphs is written again by the next step.
        logits, self.hidden = (x.index_select(0, self._active) for x in self._program.run())
        return logits

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these; they are still computed."""
        self._active = self._active[rows]


def rounded(rows: int) -> int:
    """Round up by less than a quarter, so that few programs serve many sizes: 1 to 8, 10, 12, 14, 16, 20, 24 ..."""
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return -(-rows // step) * step


def check_compilable(model: PreTrainedModel) -> None:
    """Try a few steps in fixed shapes, traced and not compiled; ValueError if model or machine cannot do them."""
    what = f"a {model.config.model_type} cannot be compiled"
    if is_encoder_decoder(model):
        raise ValueError(f"{what}: encoder-decoders keep two caches, and programs know one; {_INSTEAD}")
    if not can_cache(model):
        raise ValueError(f"{what}: {no_rows(model)}")
    if any(kind is not GrowingLayer for kind in layer_types(model) or ()):
        kept = "some of its layers keep other things than keys and values (recurrent or shared states)"
        raise ValueError(f"{what}: {kept}; {_INSTEAD}")
    if model.get_output_embeddings() not in model.children():
        raise ValueError(f"{what}: its head lies inside another module; {_INSTEAD}")
    check_tools(model.device.type)
    try:
        error = _deviation(model)
    except _FAILURES as problem:  # torch.compile's own are RuntimeErrors
        why = first_line(problem)
        raise ValueError(f"{what}: its steps cannot be traced in fixed shapes ({why}); {_INSTEAD}") from problem
    limit = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.25
    if not error <= limit:
        raise ValueError(f"{what}: steps in fixed shapes give other log-probabilities (by {error:.2g}); {_INSTEAD}")


def check_tools(device: str) -> None:
    """Raise ValueError if the compiler for this type of device is missing."""
    if device == "cuda":
        if find_spec("triton") is None:
            raise ValueError(f"compiling for CUDA needs Triton: pip install triton, or {_INSTEAD}")
        return
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        raise ValueError(
            "compiling for a CPU needs a C++ compiler, and none was found: install g++ or clang (as in "
            f"`apt install g++`), name one in the environment variable CXX, or {_INSTEAD}"
        ) from error


@torch.no_grad()
def _deviation(model: PreTrainedModel) -> float:
    """Return the largest difference of log-probabilities between fixed and growing shapes over three steps."""
    last = int(model.get_input_embeddings().weight.shape[0]) - 1
    prompts = torch.tensor([[-1, -1, last], [1, last // 2, last // 3]], device=model.device)
    usual, fixed = RowCache(model), FixedRows(model, 4, TRIED)
    usual.prefill(prompts)
    fixed.prefill(prompts)
    worst = 0.0
    for tokens in ([1, last], [last // 2, 1], [last // 3, last]):
        step = torch.tensor(tokens, device=model.device)
        found = [rows.advance(step).double().log_softmax(dim=-1) for rows in (usual, fixed)]
        worst = max(worst, float((found[0] - found[1]).abs().nan_to_num(float("inf")).max()))
    return worst
