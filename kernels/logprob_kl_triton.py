"""logprob_kl in Triton: forward online over V in one pass over both logits, backward by recomputation.

Runs under ``TRITON_INTERPRET=1`` on a CPU, for tests. The kernels are in the module beside this one.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_envs.kernels.logprob_kl import Options, Rows
from lm_envs.kernels.logprob_kl_triton_kernels import (
    INTERPRETED,
    _backward_kernel,
    _combine_kernel,
    _forward_kernel,
    _precise_kernel,
)
from lm_envs.kernels.memory import empty_gradient

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unable(logits: Tensor, ref_logits: Tensor | None, options: Options) -> str | None:
    """Why this cannot be used for these tensors, or None."""
    if logits.device.type != "cuda" and not INTERPRETED:
        return "needs CUDA, or TRITON_INTERPRET=1 before triton is imported"
    if any(x is not None and x.dtype not in _TYPES for x in (logits, ref_logits)):
        return "takes float16, bfloat16, float32 and float64"
    if ref_logits is not None:
        if ref_logits.requires_grad and torch.is_grad_enabled():
            return "gives no gradient to ref_logits"
        if (ref_logits.dtype == torch.float64) != (logits.dtype == torch.float64):
            return "needs both logits in float64 or neither"
    return None


def _pair(x: float) -> tuple[float, float]:
    high = float(np.float32(x))
    return high, float(np.float32(x - high))


def _arguments(given: Rows) -> tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]:
    """What kernels take: the reference's logits and the mask, which must be some pointers; what all of them take; and
    what those take that read whole rows."""
    z, r, ids, keep, options = given
    other = z if r is None else r
    common: dict[str, Any] = {"N": z.shape[0] * z.shape[1], "inner": z.shape[1], "V": z.shape[2]}
    for name, x in (("z", z), ("r", other)):
        common |= dict(zip((f"{name}_outer", f"{name}_inner", f"{name}_stride"), x.stride(), strict=True))
    common["inv_t_high"], common["inv_t_low"] = _pair(1.0 / options.temperature)
    common["cap_high"], common["cap_low"] = _pair(options.softcap or 1.0)
    common |= {"MASKED": keep is not None, "SOFTCAP": options.softcap is not None}
    common["ACC"] = tl.float64 if z.dtype == torch.float64 else tl.float32
    strided = {"STRIDED": z.stride(2) != 1 or other.stride(2) != 1, "bucket": z.shape[2].bit_length()}
    return other, ids if keep is None else keep, common, strided


def splits(rows: int, vocabulary: int, device: torch.device) -> int:
    """Parts of a row, a power of two: 1 if the rows alone fill the device, at least 4096 logits a part."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    parts = 1
    while rows * parts < 4 * processors and vocabulary >= parts * 8192:
        parts *= 2
    return parts


def forward(given: Rows) -> Tensor:
    """The sums of :func:`~lm_envs.kernels.logprob_kl_chunked.forward`, ``(8, N)``, of logits with any strides."""
    z, r, ids = given[:3]
    rows = ids.numel()
    stats = torch.zeros(8, rows, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    if rows == 0:
        return stats
    other, mask, common, strided = _arguments(given)
    parts = splits(rows, z.shape[2], z.device)
    partial = stats if parts == 1 else stats.new_empty(rows * parts, 7)
    split = {"SPLIT": parts, "TWO": r is not None}
    with _on(z):
        _forward_kernel[(rows * parts,)](z, other, ids, mask, stats, partial, **common, **strided, **split)
        if parts > 1:
            _combine_kernel[(rows,)](z, other, ids, mask, stats, partial, **common, **split)
        if given.options.precise and r is not None:
            _precise_kernel[(rows,)](z, other, mask, stats, **common, **strided)
    return stats


def backward(given: Rows, stats: Tensor, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of :func:`~lm_envs.kernels.logprob_kl_chunked.backward`; ``out`` is not ``z`` itself: tuning runs a
    kernel several times."""
    z, r, ids = given[:3]
    dz = empty_gradient(z) if out is None else out
    if dz.numel() == 0:
        return dz
    other, mask, common, strided = _arguments(given)
    with _on(z):
        _backward_kernel[lambda meta: (ids.numel() * triton.cdiv(z.shape[2], meta["BLOCK"]),)](
            z, other, ids, mask, stats, coefficients.contiguous(), dz, **common, **strided, TWO=r is not None
        )
    return dz


def _on(x: Tensor) -> Any:
    """Kernels go to the current device: make it the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
