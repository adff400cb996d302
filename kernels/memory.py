"""Fresh memory for gradients of the size of logits."""

import ctypes
import platform

import torch
from torch import Tensor

HUGE = 2**25  # bytes from which large pages are asked for: glibc takes such memory fresh from the system each time
_HUGE_PAGE, _MADV_HUGEPAGE = 2**21, 14


def empty_gradient(x: Tensor) -> Tensor:
    """Contiguous, uninitialized, of the shape, dtype and device of ``x``; on Linux in large pages if it is large.

    A page fault per 2 MiB instead of one per 4 KiB: faults are most of what a gradient of that size costs on a CPU.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = out.numel() * out.element_size()
    if x.device.type == "cpu" and size >= HUGE and platform.system() == "Linux":
        begin = -(-out.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (out.data_ptr() + size) // _HUGE_PAGE * _HUGE_PAGE
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        advise(begin, end - begin, _MADV_HUGEPAGE)  # a hint: where it is refused, only time is lost
    return out
