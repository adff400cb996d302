"""logprob_kl in C for float32 and bfloat16 logits on a CPU: one pass over the logits each way, rows over threads.

The C file beside this one is compiled when first used (see :mod:`~lm_envs.kernels.native_library`). Where that fails,
:func:`unable` says why and "auto" takes "chunked".
"""

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lm_envs.kernels.logprob_kl import Options, Rows
from lm_envs.kernels.memory import empty_gradient
from lm_envs.kernels.native_library import Unavailable, load
from lm_envs.kernels.threads import share

SOURCE = Path(__file__).with_suffix(".c")
# No -ffast-math: infinities and NaN keep their meaning. Contraction makes a*b+c one instruction.
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
BLOCK = 2**19  # logits of a thread's turn: enough to forget the turn's cost, few enough to share rows out evenly


def unable(logits: Tensor, ref_logits: Tensor | None, options: Options) -> str | None:
    """Why this cannot be used for these tensors, or None."""
    if logits.device.type != "cpu" or logits.dtype not in DTYPES:
        return "takes float32 and bfloat16 on a CPU"
    if options.softcap is not None:
        return "has no softcap"
    if ref_logits is not None:
        if ref_logits.dtype != logits.dtype:
            return "needs both logits in one dtype"
        if ref_logits.requires_grad and torch.is_grad_enabled():
            return "gives no gradient to ref_logits"
    if any(x is not None and x.stride(-1) != 1 and x.shape[-1] > 1 for x in (logits, ref_logits)):
        return "needs the logits of a row side by side (stride 1)"
    return _library_or_reason()[1]


def forward(given: Rows) -> Tensor:
    """The sums of :func:`~lm_envs.kernels.logprob_kl_chunked.forward`, ``(8, N)`` float32, m and n not divided by the
    temperature; z and r have stride 1 along V."""
    stats = torch.empty(8, given.ids.numel(), dtype=torch.float32)
    _call("forward", given, int(given.options.precise), stats.data_ptr())
    return stats


def backward(given: Rows, stats: Tensor, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of :func:`~lm_envs.kernels.logprob_kl_chunked.backward`; ``out`` is contiguous and may be ``z``."""
    dz = empty_gradient(given.z) if out is None else out
    coefficients = coefficients.contiguous()
    _call("backward", given, stats.data_ptr(), coefficients.data_ptr(), dz.data_ptr())
    return dz


def _call(direction: str, given: Rows, *more: int) -> None:
    """Call the library on blocks of rows, in torch's number of threads."""
    library, reason = _library_or_reason()
    if library is None:
        raise RuntimeError(f"logprob_kl_native {reason}")
    z, r, ids, keep, options = given
    call = getattr(library, f"{direction}_{DTYPES[z.dtype]}")
    strides = (ctypes.c_int64 * 4)(*z.stride()[:2], *(r.stride()[:2] if r is not None else (0, 0)))
    pointers = tuple(None if x is None else x.data_ptr() for x in (z, r, ids, keep))
    rows, step = ids.numel(), max(1, BLOCK // z.shape[2])
    behind = (rows, z.shape[1], z.shape[2], strides, 1.0 / options.temperature, *more)

    def turns(begins: Iterator[int]) -> None:
        for begin in begins:
            call(*pointers, begin, min(begin + step, rows), *behind)

    share(range(0, rows, step), -(-rows // step), turns)


@functools.lru_cache(maxsize=1)
def _library_or_reason() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        library = load(SOURCE, FLAGS)
    except Unavailable as error:
        return None, f"cannot be compiled here ({error})"
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    common = [pointer] * 4 + [integer] * 5 + [pointer, number]
    for name in DTYPES.values():
        getattr(library, f"forward_{name}").argtypes = [*common, ctypes.c_int, pointer]
        getattr(library, f"backward_{name}").argtypes = [*common, pointer, pointer, pointer]
        getattr(library, f"forward_{name}").restype = getattr(library, f"backward_{name}").restype = None
    return library, None
