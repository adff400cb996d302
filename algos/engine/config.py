"""The settings every algorithm has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class AgentConfig:
    """What every algorithm has. Subclasses add theirs and change defaults."""

    learning_rate: float = 3e-4
    """Adam's step size at the start."""
    anneal: bool = True
    """Lower the step size linearly to 0 over `iterations`."""
    iterations: int = 100
    """Iterations of one run: each samples a batch and learns from it."""
    episodes: int | None = 128
    """Whole episodes sampled per iteration (text; control where whole episodes are needed)."""
    steps: int | None = None
    """Env steps sampled per iteration as fragments of episodes (control only); replaces `episodes`."""
    group_size: int = 1
    """Episodes in a row that share a prompt; the text env is made with the same number."""
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 1
    """Adam steps per pass."""
    micro_batch: int | None = None
    """Most rows per forward, to save memory; the gradient does not depend on it. None is all rows."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    gamma: float = 1.0
    """Discount."""
    kl_coef: float | None = None
    """Coefficient of the KL penalty. None takes the env's, else the algorithm's published one, else the task's."""
    kl_target: float | None = None
    """Steer the coefficient towards this KL to the reference, nats per sequence. None keeps it fixed."""
    kl_horizon: float = 10_000.0
    """Episodes over which the steered coefficient reacts; smaller is faster."""
    seed: int = 0
    """Decides the sampled actions and the order of minibatches."""

    def __post_init__(self) -> None:
        for name in (
            "learning_rate",
            "iterations",
            "epochs",
            "minibatches",
            "group_size",
            "max_grad_norm",
            "adam_eps",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{type(self).__name__}.{name} must be positive, got {getattr(self, name)}")
        for name in ("episodes", "steps", "micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{type(self).__name__}.{name} must be positive or None, got {getattr(self, name)}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"{type(self).__name__}.gamma must lie in [0, 1], got {self.gamma}")
        if self.episodes is None and self.steps is None:
            raise ValueError(f"{type(self).__name__} needs episodes or steps: how much to sample per iteration")
        if self.steps is None and self.episodes is not None and self.episodes % self.group_size:
            raise ValueError(
                f"{type(self).__name__}.episodes must be a multiple of group_size, "
                f"got {self.episodes} and {self.group_size}"
            )
