"""Weights that are cut into shares, one on each process of a run, while nobody needs them whole."""

import ctypes
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from lm_envs.processes import group

_M_MMAP_THRESHOLD = -3  # in glibc's malloc.h


class Cut:
    """A weight that is whole on each process, or cut along its first axis into a share on each.

    Args:
        share: where this process's share is put; None makes a place.
    """

    def __init__(self, weight: nn.Parameter, name: str, mesh: Any, share: Tensor | None = None) -> None:
        self.weight, self.name, self._mesh = weight, name, mesh
        self.shape, self.stride = weight.shape, weight.stride()
        self.share = torch.empty_like(own_share(weight.data)) if share is None else share
        self._storage = self.share.untyped_storage()
        self._size = self._storage.nbytes()
        self._whole = True
        self.free()

    def cut(self) -> None:
        """Keep this process's share, and free the whole."""
        self._storage.resize_(self._size)
        self.share.copy_(own_share(self.weight.data))
        self.weight.data = self.share.new_full((), math.nan).expand(self.shape)  # one number: a use of it shows
        self._whole = False

    def join(self) -> None:
        """Make the weight whole, if it is cut; every process does."""
        if not self._whole:
            self.weight.data = self.together(self.share.detach())
            self._whole = True

    def free(self) -> None:
        """Free the share."""
        self._storage.resize_(0)

    def together(self, share: Tensor) -> Tensor:
        """Put shares together."""
        from torch.distributed.tensor import DTensor, Shard

        with group.waiting(f"the whole of {self.name}"):
            x = DTensor.from_local(share, self._mesh, [Shard(0)], shape=self.shape, stride=self.stride)
            return x.full_tensor()


def own_share(x: Tensor) -> Tensor:
    """This process's share of a tensor."""
    size = -(-len(x) // group.count())
    return x[group.number() * size :][:size]


def give_back() -> None:
    """Let glibc give freed memory back to the system: what is free now, and from here on tensors of a megabyte; by
    itself it learns to keep them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
        ctypes.CDLL(None).malloc_trim(0)


def can_be_cut(p: nn.Parameter) -> bool:
    """Whether it holds numbers in a plain layout: not one of a quantized model, say."""
    return type(p) is nn.Parameter and p.is_floating_point() and p.ndim > 0 and p.is_contiguous() and not p.is_meta
