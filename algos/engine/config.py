"""The settings every algorithm has."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from lm_envs.settings import Count, NonNegative, Positive, Probability, Rate, Seed, Settings, Size


@dataclass
class AgentConfig(Settings):
    """What every algorithm has. Subclasses add theirs and change defaults.

    Raises:
        lm_envs.settings.SettingError: a value that its field cannot have.
        ValueError: settings that do not fit together.
    """

    whole_episodes: ClassVar[bool] = False
    """Whether it learns from whole episodes only, so that `steps` mean nothing."""

    learning_rate: Rate = 3e-4
    """Adam's step size at the start."""
    anneal: bool = True
    """Lower the step size linearly to 0 over `iterations`."""
    iterations: Count = 100
    """Iterations of one run: each samples a batch and learns from it."""
    episodes: Size | None = 128
    """Whole episodes sampled per iteration (text; control where whole episodes are needed)."""
    steps: Size | None = None
    """Env steps sampled per iteration as fragments of episodes (control only); replaces `episodes`."""
    group_size: Size = 1
    """Consecutive episodes that share a prompt; the text env must have the same group_size."""
    draws: Count = 1
    """Most batches sampled per iteration, for rows that `select` left out; each samples what is missing."""
    epochs: Count = 1
    """Passes over each batch."""
    minibatches: Count = 1
    """Adam steps per pass."""
    micro_batch: Size | None = None
    """Most rows per forward, to save memory; the gradient does not depend on it. None is all rows."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients with a larger norm are scaled down to it."""
    adam_eps: Positive = 1e-5
    """Adam's epsilon."""
    gamma: Probability = 1.0
    """Discount."""
    kl_coef: NonNegative | None = None
    """Coefficient of the KL penalty. None takes the env's, else the algorithm's published one, else the task's."""
    kl_target: Positive | None = None
    """Steer the coefficient toward this KL to the reference, nats per sequence. None keeps it fixed."""
    kl_horizon: Positive = 3.0
    """Iterations over which the steered coefficient's base reacts; smaller is faster."""
    seed: Seed = 0
    """Decides the sampled actions and the order of minibatches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.whole_episodes:
            raise ValueError(f"{type(self).__name__} learns from whole episodes: set episodes, not steps")
        if self.episodes is None and self.steps is None:
            raise ValueError(f"{type(self).__name__} needs episodes or steps: how much to sample per iteration")
        if self.steps is None and self.episodes is not None and self.episodes % self.group_size:
            given = f"{self.episodes} and {self.group_size}"
            raise ValueError(f"{type(self).__name__}.episodes must be a multiple of group_size, got {given}")

    @property
    def learned(self) -> int | None:
        """Most episodes of a batch that are learned from, after its ``select``; None where steps are sampled."""
        return self.episodes
