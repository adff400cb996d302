"""The weights that a run trains: all of them on each process, or a share on each by PyTorch's FSDP2 (Zhao et al. 2023).

With shares, the policy itself is whole except during an update. Then its weights are freed, and a copy of it is
evaluated which holds shares, and whose layers are put together one at a time. Gradients and Adam's state are shares.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lm_envs.processes import group, sharing
from lm_envs.training import take_step


class Replica:
    """All trained weights on each process.

    Attributes:
        even: each process must evaluate as often as the others.
        parameters: by name, what the optimizer steps.
    """

    even = False

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Take the policy's weights at the start of an update, and give them back at its end."""
        yield

    def evaluate(self, traj: Any) -> Any:
        """Evaluate the policy, differentiably, during an update."""
        return self.policy.evaluate(traj)

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        """Step by the gradients of all processes together; see :func:`take_step`."""
        sharing.sum_gradients(self.parameters.values())
        return take_step(optimizer, self.parameters.values(), max_grad_norm)

    def whole(self, name: str, state: Tensor) -> Tensor:
        """An optimizer's state for a parameter, copied to the CPU for a checkpoint."""
        return state.detach().to("cpu", copy=True)

    def mine(self, name: str, state: Tensor) -> Tensor:
        """Undo :meth:`whole`."""
        return state


class Shards(Replica):
    """A share of the trained weights on each process; what is frozen stays whole.

    Raises:
        ValueError: a layer's trained weights differ in precision.
    """

    even = True  # every layer is put together by all of them

    def __init__(self, policy: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(policy)
        self._whole = self.parameters
        frozen = {p for p in policy.parameters() if not p.requires_grad}
        kept = {id(x): x for x in (*frozen, *policy.buffers())}  # the copy shares them
        self._forward = _Forward(copy.deepcopy(policy, kept))
        device = next(iter(self._whole.values())).device.type
        self._mesh = init_device_mesh(device, (group.count(),))
        _shard(self._forward, self._mesh, frozen)
        held = [p for p in self._forward.parameters() if p.requires_grad]
        self._shares: dict[str, Any] = dict(zip(self._whole, held, strict=True))
        self.parameters = {name: nn.Parameter(p.to_local().detach()) for name, p in self._shares.items()}
        storages = {name: p.untyped_storage() for name, p in self.parameters.items()}
        self._storages = {name: (storage, storage.nbytes()) for name, storage in storages.items()}
        for storage in storages.values():
            storage.resize_(0)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """As :meth:`Replica.updating`; where the update fails, the policy's weights are lost."""
        for name, p in self._whole.items():
            storage, size = self._storages[name]
            storage.resize_(size)
            self.parameters[name].data.copy_(self.mine(name, p.data))
            p.data = p.new_full((), math.nan).expand(p.shape)  # one number: a use of it shows
        yield
        for p in (*self.parameters.values(), *self._shares.values()):
            p.grad = None
        for name, p in self._whole.items():
            p.data = self._together(name, self.parameters[name].data)
            self._storages[name][0].resize_(0)
        torch.autograd.graph.increment_version(self._whole.values())  # caches look at it

    def evaluate(self, traj: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nobody writes into what it returns
            return self._forward(traj)

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        if optimizer.param_groups[0]["params"][0] is not next(iter(self.parameters.values())):
            raise ValueError("--fsdp: this algorithm's own optimizer steps all weights at a time: do without --fsdp")
        for name, p in self._shares.items():  # backward has added up their gradients
            self.parameters[name].grad = None if p.grad is None else p.grad.to_local()
            p.grad = None
        return take_step(optimizer, self.parameters.values(), max_grad_norm, _norm_of_all)

    def whole(self, name: str, state: Tensor) -> Tensor:
        """As :meth:`Replica.whole`, on process 0 alone, which writes it."""
        if not state.ndim:  # the number of steps
            return super().whole(name, state)
        found = self._together(name, state)
        return found.cpu() if group.number() == 0 else torch.empty(0)

    def mine(self, name: str, state: Tensor) -> Tensor:
        if not state.ndim:
            return state
        size = -(-len(state) // group.count())
        return state[group.number() * size :][:size]

    def _together(self, name: str, share: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        like = self._shares[name]
        with group.waiting(f"the whole of {name}"):
            x = DTensor.from_local(share, self._mesh, like.placements, shape=like.shape, stride=like.stride())
            return x.full_tensor()


def weights_of(policy: Any) -> Replica:
    """The trained weights of a policy, as the processes of the run hold them."""
    return Shards(policy) if group.sharded() else Replica(policy)


class _Forward(nn.Module):
    """A policy's evaluation as a forward, which is what FSDP surrounds."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, traj: Any) -> Any:
        return self.policy.evaluate(traj)


def _norm_of_all(norm: Tensor) -> Tensor:
    square = norm.double().square()
    group.add(square, "the gradient's norm")
    return square.sqrt().to(norm.dtype)


def _shard(forward: _Forward, mesh: Any, frozen: set[nn.Parameter]) -> None:
    """Share out layers, parts of another precision than the rest, and the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    class Gather(DefaultAllGather):
        def __call__(self, *given: Any, **options: Any) -> Any:
            with group.waiting("the weights of a layer"):
                return super().__call__(*given, **options)

    class Sum(DefaultReduceScatter):
        def __call__(self, *given: Any, **options: Any) -> Any:
            with group.waiting("the gradients of a layer"):
                return super().__call__(*given, **options)

    trained = [p for p in forward.parameters() if p not in frozen]
    others = [part for part in forward.policy.children() if any(p.dtype != trained[0].dtype for p in part.parameters())]
    open_ = set(trained)
    for module in (*_layers(forward), *others, forward):
        held = [p for p in module.parameters() if p in open_]
        if len(dtypes := {p.dtype for p in held}) > 1:
            raise ValueError(
                f"--fsdp: the trained weights of one {type(module).__name__} are in "
                f"{' and '.join(sorted(map(str, dtypes)))}, and must be in one precision: do without --fsdp"
            )
        if not held and module is not forward:
            continue
        open_.difference_update(held)
        precise = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(held[0].dtype, torch.float32) if held else None)
        made: Any = fully_shard(module, mesh=mesh, mp_policy=precise, ignored_params=frozen)
        made.set_custom_all_gather(Gather())
        made.set_custom_reduce_scatter(Sum())
        # Losses are divided by the units of all processes, so their gradients are added up.
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _layers(child)
    return found
