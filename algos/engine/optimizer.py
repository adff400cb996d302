"""Adam (Kingma and Ba 2015), the same with master weights for bfloat16, and both in checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from lm_envs.algos.engine.shards import Replica
from lm_envs.algos.policies.adaptation import learned_state, load_learned_state

MASTER = "master"
_STATE = ("step", "exp_avg", "exp_avg_sq", MASTER)


def make_adam(parameters: Mapping[str, nn.Parameter], name: str, lr: float, eps: float) -> torch.optim.Adam:
    """Adam for a policy's parameters: with master weights if some are in bfloat16.

    Raises:
        ValueError: some are in float16; ``name`` begins the message.
    """
    dtypes = {p.dtype for p in parameters.values()}
    if torch.float16 in dtypes:
        raise ValueError(
            f"{name}: the policy's weights are in float16, where gradients below 6e-8 are 0 unless the loss is scaled, "
            "which nothing here does: train it in bfloat16, which has float32's range, or in float32"
        )
    kind = MasterAdam if torch.bfloat16 in dtypes else torch.optim.Adam
    fused = not any(p.is_meta for p in parameters.values())  # those without numbers are for planning
    return kind(parameters.values(), lr=lr, eps=eps, fused=fused)


class MasterAdam(torch.optim.Adam):
    """Adam that keeps a float32 copy of each parameter of less precision, steps that, and rounds it into the parameter.

    A step below 1/512 of a bfloat16 weight is lost on the weight itself; in the copy such steps add up until they show
    (Micikevicius et al. 2018, section 3.1). Copy and moments are float32 state, so they are in checkpoints. Where
    somebody else wrote a parameter since the last step, what they wrote holds.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on all parameters that have a gradient.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("MasterAdam takes no closure")
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in held]
            weights = [state.get(MASTER, p) for state, p in zip(states, held, strict=True)]
            adam(
                weights,
                [p.grad.to(weight.dtype) for p, weight in zip(held, weights, strict=True)],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                foreach=False,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
            for p, weight in zip(held, weights, strict=True):
                if weight is not p:
                    p.copy_(weight)

    def _state(self, p: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[p]
        low = p.dtype in (torch.bfloat16, torch.float16)
        if not state:
            weight = p.detach().float() if low else p.detach()
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            if low:
                state[MASTER] = weight
        elif low:
            master = state[MASTER]
            master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))
        return state


def tensors_of(
    policy: nn.Module,
    weights: Replica,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Collect a checkpoint's tensors, copied to the CPU: what the policy learned, the optimizer's state of
    ``weights``, and others."""
    weights.check_held()
    held = {f"policy.{name}": t for name, t in learned_state(policy).items()}
    held |= {f"extra.{name}": t for name, t in extra.items()}
    tensors = {name: t.detach().to("cpu", copy=True) for name, t in held.items()}
    for name, parameter in weights.parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"adam.{key}.{name}": weights.whole(name, t) for key, t in state.items()}
    return tensors


def take_back(
    policy: nn.Module,
    weights: Replica,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Put :func:`tensors_of` back into policy and optimizer and return the others; ValueError if the policy differs."""
    weights.check_held()
    load_learned_state(policy, _part(tensors, "policy."))
    optimizer.state.clear()
    for name, parameter in weights.parameters.items():
        found = {key: t for key in _STATE if (t := tensors.get(f"adam.{key}.{name}")) is not None}
        if found:
            held = {key: weights.mine(name, t).to(parameter.device, copy=True) for key, t in found.items()}
            optimizer.state[parameter] = held
    return _part(tensors, "extra.")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
