"""The tensors of a checkpoint by name, for safetensors: what a policy learned, Adam's state, and an algorithm's own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lm_envs.algos.engine.optimizer import MASTER
from lm_envs.algos.policies.adaptation import learned_state, load_learned_state

_ADAM = ("step", "exp_avg", "exp_avg_sq", MASTER)


def tensors_of(
    policy: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Copies on the CPU, without frozen parameters; ``parameters`` are those the optimizer steps, by name."""
    tensors = {f"policy.{name}": t for name, t in learned_state(policy).items()}
    for name, parameter in parameters.items():
        tensors |= {f"adam.{key}.{name}": t for key, t in optimizer.state.get(parameter, {}).items()}
    tensors |= {f"extra.{name}": t for name, t in extra.items()}
    return {name: t.detach().cpu().clone() for name, t in tensors.items()}


def take_back(
    policy: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Put :func:`tensors_of` back into policy and optimizer; the further tensors.

    Raises:
        ValueError: they are of another policy.
    """
    load_learned_state(policy, _part(tensors, "policy."))
    optimizer.state.clear()
    for name, parameter in parameters.items():
        held = {key: tensors[f"adam.{key}.{name}"] for key in _ADAM if f"adam.{key}.{name}" in tensors}
        if held:
            optimizer.state[parameter] = {key: t.to(parameter.device, copy=True) for key, t in held.items()}
    return _part(tensors, "extra.")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
