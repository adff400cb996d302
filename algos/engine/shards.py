"""The weights that a run trains: all of them on each process, or a share on each by PyTorch's FSDP2 (Zhao et al. 2023).

With shares, all models are whole except during an update. Then their weights are cut into shares, and a copy of the
policy is evaluated whose layers are put together one at a time. Gradients and Adam's state are shares.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lm_envs.algos.engine.cuts import Cut, can_be_cut, give_back, own_share
from lm_envs.processes import group, sharing
from lm_envs.processes.group import waiting
from lm_envs.training import take_step

try:
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # before torch 2.13
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single

LOST = "with --fsdp a failed update leaves no whole model in memory: start again from the last checkpoint (--resume)"


class Replica:
    """All trained weights on each process.

    Attributes:
        even: each process must evaluate as often as the others.
        parameters: by name, what the optimizer steps.
        after_failure: what an update that failed leaves.
    """

    even = False
    after_failure = "the weights were left as they were before this step"

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}

    @contextmanager
    def updating(self, idle: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Take the policy's weights at the start of an update, and give them back at its end.

        Args:
            idle: models that the update may not need.
        """
        yield

    def check_held(self) -> None:
        """Raise ValueError if an update failed and left no weights."""

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
    """A share of the weights on each process.

    Raises:
        ValueError: a layer's trained weights differ in precision.
    """

    even = True  # every layer is put together by all of them
    after_failure = LOST

    def __init__(self, policy: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(policy)
        device = next(iter(self.parameters.values())).device.type
        give_back()
        self._mesh = init_device_mesh(device, (group.count(),))
        held = {name: p for name, p in policy.named_parameters() if p.requires_grad or can_be_cut(p)}
        others = set(policy.parameters()).difference(held.values())
        kept = {id(x): x for x in (*policy.parameters(), *policy.buffers())}  # which FSDP replaces in the copy
        self._forward = _Forward(copy.deepcopy(policy, kept))
        _shard(self._forward, self._mesh, others)
        copies = [p for p in self._forward.parameters() if p not in others]
        self._shares: dict[str, Any] = dict(zip(held, copies, strict=True))
        self._cuts = {n: Cut(held[n], n, self._mesh, p.to_local().detach()) for n, p in self._shares.items()}
        self.parameters = {name: nn.Parameter(self._cuts[name].share) for name in self.parameters}
        self._lost = False

    @contextmanager
    def updating(self, idle: Iterable[nn.Module] = ()) -> Iterator[None]:
        """As :meth:`Replica.updating`. An idle model is put together where the update calls it after all."""
        self.check_held()
        models, hooks = list(idle), []
        cuts = {cut.weight: cut for cut in self._cuts.values()}
        for model in models:
            for name, p in model.named_parameters():
                if p not in cuts and can_be_cut(p):
                    cuts[p] = Cut(p, f"{type(model).__name__}.{name}", self._mesh)

        def join(model: nn.Module, *_: Any) -> None:
            for p in model.parameters():
                if p in cuts:
                    cuts[p].join()

        self._lost = True
        try:
            for cut in cuts.values():
                cut.cut()
            give_back()
            for model in models:
                # Of any part: what is beside it, such as a head's weight, may be read without a forward.
                hooks += [part.register_forward_pre_hook(partial(join, model)) for part in model.modules()]
            yield
            for p in (*self.parameters.values(), *self._shares.values()):
                p.grad = None
            for cut in cuts.values():
                cut.join()
                cut.free()
        except BaseException as error:
            error.add_note(LOST)
            raise
        finally:
            for hook in hooks:
                hook.remove()
        self._lost = False
        trained = [self._cuts[name].weight for name in self.parameters]
        torch.autograd.graph.increment_version(trained)  # caches look at it

    def check_held(self) -> None:
        if self._lost:
            raise ValueError(f"an update failed before, and {LOST}")

    def evaluate(self, traj: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nobody writes into what it returns
            return self._forward(traj)

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        if optimizer.param_groups[0]["params"][0] is not next(iter(self.parameters.values())):
            raise ValueError("--fsdp: this algorithm's own optimizer steps all weights at a time: do without --fsdp")
        for name, p in self.parameters.items():  # backward has added up their gradients
            share = self._shares[name]
            p.grad = None if share.grad is None else share.grad.to_local()
            share.grad = None
        return take_step(optimizer, self.parameters.values(), max_grad_norm, _norm_of_all)

    def whole(self, name: str, state: Tensor) -> Tensor:
        """As :meth:`Replica.whole`, on process 0 alone, which writes it."""
        if not state.ndim:  # the number of steps
            return super().whole(name, state)
        found = self._cuts[name].together(state)
        return found.cpu() if group.number() == 0 else torch.empty(0)

    def mine(self, name: str, state: Tensor) -> Tensor:
        return own_share(state) if state.ndim else state


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


class _Gather:
    """How the weights of a layer are put together, for FSDP."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        with waiting("the weights of a layer"):
            return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _Sum(_Gather):
    """How the gradients of a layer are summed into shares, for FSDP."""

    def __call__(  # type: ignore[override]
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        with waiting("the gradients of a layer"):
            return reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def _norm_of_all(norm: Tensor) -> Tensor:
    square = norm.double().square()
    group.add(square, "the gradient's norm")
    return square.sqrt().to(norm.dtype)


def _shard(forward: _Forward, mesh: Any, others: set[nn.Parameter]) -> None:
    """Share out layers, parts of another precision than the rest, and the rest, all without ``others``."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def trained(module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module.parameters() if p.requires_grad and p in open_]

    open_ = {p for p in forward.parameters() if p not in others}
    first = trained(forward)[0].dtype
    parts = [part for part in forward.policy.children() if any(p.dtype != first for p in trained(part))]
    for module in (*_layers(forward), *parts, forward):
        if len(dtypes := {p.dtype for p in trained(module)}) > 1:
            raise ValueError(
                f"--fsdp: the trained weights of one {type(module).__name__} are in "
                f"{' and '.join(sorted(map(str, dtypes)))}, and must be in one precision: do without --fsdp"
            )
        if open_.isdisjoint(module.parameters()) and module is not forward:
            continue
        open_.difference_update(module.parameters())
        precise = MixedPrecisionPolicy(
            reduce_dtype=torch.promote_types(dtypes.pop(), torch.float32) if dtypes else None
        )
        made: Any = fully_shard(module, mesh=mesh, mp_policy=precise, ignored_params=others)
        made.set_custom_all_gather(_Gather())
        made.set_custom_reduce_scatter(_Sum())
        # Losses are divided by the units of all processes, so their gradients are added up.
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _layers(child)
    return found
