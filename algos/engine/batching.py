"""Cut a batch into minibatches (an Adam step each) and micro-batches (a forward each), by units that stay whole."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.ops.advantages import masked
from lm_envs.algos.ops.losses import k3, tally
from lm_envs.algos.policies.base import Policy
from lm_envs.processes import group, sharing
from lm_envs.trajectories import Trajectories

UNITS = ("token", "sequence", "group")
PARTS = (1, 2, 3, 4, 6, 8)  # numbers of parts that a minibatch may be cut into by length; the first of equals is taken
START = 2**23  # multiplications that take as long on a CPU as starting the operations of a weight


def rewards(traj: Trajectories) -> Tensor:
    """``traj.reward (B, T)``; ValueError where there is none, as in demonstrations and preferences."""
    if traj.reward is None:
        raise ValueError("this algorithm learns from rewards, and these trajectories have none")
    return traj.reward


def episode_value(traj: Trajectories) -> Tensor:
    """``(B,)`` ranks episodes: the reward model's score where there is one, else the undiscounted return."""
    return masked(rewards(traj), traj.mask).sum(dim=1) if traj.score is None else traj.score


class Before:
    """The policy's ``Evaluation`` of a batch before the update, without gradients, computed when first read.

    Args:
        micro_batch: most rows per forward.
        kept: the policy's weights are those that sampled the batch, so what came with the samples needs no forward.
    """

    def __init__(
        self, policy: Policy, traj: Trajectories, micro_batch: int | None = None, *, kept: bool = False
    ) -> None:
        self._policy = policy
        self._traj, self._rows = traj, micro_batch or len(traj)
        self._kept = kept and policy.keeps_logprob
        self._parts: list[Any] | None = None

    @cached_property
    def _shares(self) -> list[sharing.Rows]:
        return sharing.shares(costs(self._traj).cpu())

    def _batches(self) -> list[Trajectories]:
        """The parts of this process's share of the rows."""
        traj = self._traj
        if group.world() > 1:
            traj = traj.select(torch.from_numpy(self._shares[group.rank()]))
        if self._rows >= len(traj):
            return [traj] if len(traj) else []
        return [traj.select(slice(i, i + self._rows)) for i in range(0, len(traj), self._rows)]

    def _whole(self, parts: Iterable[Tensor]) -> Tensor:
        """Tensors of this process's rows, as those of all rows."""
        held = list(parts)
        if group.world() == 1:
            return torch.cat(held)
        found = sharing.gather(self._shares, {"x": torch.cat(held)} if held else {}, "the batch before the update")["x"]
        assert found is not None
        return found.to(self._traj.mask.device)

    def _evaluated(self) -> list[Any]:
        if self._parts is None:
            with torch.no_grad():
                self._parts = [self._policy.evaluate(part) for part in self._batches()]
        return self._parts

    @property
    def knows_value(self) -> bool:
        """Whether the values have been read."""
        return "value" in vars(self)

    @property
    def was_read(self) -> bool:
        """Whether the forward has been paid for."""
        return self._parts is not None

    @cached_property
    def logprob(self) -> Tensor:
        if self._kept and self._traj.logprob is not None and not self.was_read:
            precise = torch.promote_types(next(self._policy.parameters()).dtype, torch.float32)
            return masked(self._traj.logprob.to(precise), self._traj.mask)
        return self._whole(part.logprob for part in self._evaluated())

    @cached_property
    def entropy(self) -> Tensor:
        return self._whole(part.entropy for part in self._evaluated())

    @cached_property
    @torch.no_grad()
    def value(self) -> Tensor:
        if self._kept and not self.was_read:
            if self._traj.value is not None:
                return self._traj.value
            if self._policy.has_own_critic:
                return self._whole(self._policy.critic_values(part) for part in self._batches())
        return self._whole(part.value for part in self._evaluated())

    def log_probs(self) -> Tensor:
        with torch.no_grad():
            return self._whole(part.log_probs() for part in self._evaluated())

    def q_values(self) -> Tensor:
        with torch.no_grad():
            return self._whole(part.q_values() for part in self._evaluated())


def costs(traj: Trajectories) -> Tensor:
    """``(B,)`` tokens of each row, prompt and response; for control its steps."""
    lengths = traj.response_lengths
    return lengths if traj.prompt is None else lengths + (traj.prompt >= 0).sum(dim=1)


def share(traj: Trajectories, unit: str) -> Tensor | None:
    """The rows of a minibatch that this process learns from, whole units; None for all."""
    if group.world() == 1:
        return None
    together = groups(traj)[1].cpu() if unit == "group" else None
    mine = sharing.shares(costs(traj).cpu(), together)[group.rank()]
    return torch.from_numpy(mine).to(traj.mask.device)


def groups(traj: Trajectories) -> tuple[Tensor, Tensor]:
    """The groups' numbers, and each row's index into them; ValueError without groups."""
    if traj.group is None:
        raise ValueError("a loss over groups needs Trajectories.group, and these have none")
    found, inverse = torch.unique(traj.group, return_inverse=True)
    return found, inverse


def units(traj: Trajectories, unit: str) -> int:
    """How many tokens (real steps), sequences (rows) or groups a batch holds."""
    if unit == "token":
        return int(traj.mask.sum())
    if unit == "sequence":
        return len(traj)
    if unit == "group":
        return len(groups(traj)[0])
    raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")


def minibatches(traj: Trajectories, unit: str, count: int, rng: np.random.Generator) -> Iterator[Tensor | None]:
    """Row indices of each of ``count`` shuffled minibatches; a single None is the whole batch as it is.

    With unit "group" the groups are shuffled and none is split.
    """
    if count == 1:
        yield None
        return
    if unit == "group":
        found, inverse = groups(traj)
        order = np.array_split(rng.permutation(len(found)), count)
        parts = [np.flatnonzero(np.isin(inverse.cpu().numpy(), chosen)) for chosen in order]
    else:
        parts = np.array_split(rng.permutation(len(traj)), count)
    for part in parts:
        if len(part):
            yield torch.from_numpy(part).to(traj.mask.device)


def passes(
    traj: Trajectories, unit: str, config: AgentConfig, iteration: int
) -> Iterator[tuple[int, int, Tensor | None]]:
    """The minibatches of an iteration, the same on every process: epoch, number in the run, and rows as
    :func:`minibatches` gives them."""
    for epoch in range(config.epochs):
        rng = np.random.default_rng((config.seed, iteration, epoch))
        first = (iteration * config.epochs + epoch) * config.minibatches
        for number, index in enumerate(minibatches(traj, unit, config.minibatches, rng), first):
            yield epoch, number, index


def select(traj: Trajectories, fixed: Mapping[str, Tensor], rows: Tensor) -> tuple[Trajectories, dict[str, Tensor]]:
    """Some rows of a batch and of the tensors that go with it, without the columns that only other rows need."""
    part = traj.select(rows)
    part = part if traj.prompt is None else part.trim(prompt=True)
    whole, steps = traj.mask.shape[1], part.mask.shape[1]
    held = {name: x[rows] for name, x in fixed.items()}
    return part, {n: x[:, :steps] if x.ndim > 1 and x.shape[1] == whole else x for n, x in held.items()}


def mismatch(logprob: Tensor, traj: Trajectories, same: bool) -> dict[str, Any]:
    """How far log-probabilities ``(B, T)`` are from those a batch was sampled with.

    Returns:
        ``sampler_kl``, an estimate of KL(sampler || policy) in nats per token that is never negative, as a sum and a
        count; and if both are said to be the ``same``, ``logprob_gap_max``, their largest difference in nats.
    """
    assert traj.logprob is not None
    found: dict[str, Any] = {"sampler_kl": tally(k3(traj.logprob, logprob, traj.mask), traj.mask)}
    return found | ({"logprob_gap_max": masked((traj.logprob - logprob).abs(), traj.mask).max()} if same else {})


def own_parts(
    traj: Trajectories, fixed: dict[str, Tensor], unit: str, most: int | None, forward: float | None, even: bool = False
) -> Iterator[tuple[Trajectories, dict[str, Tensor], bool]]:
    """The parts of a minibatch that this process evaluates, one per forward, and whether it learns from them.

    It learns from its :func:`share`, cut into :func:`micro_batches`. With ``even`` it evaluates as often as the other
    processes, the first unit if nothing is left of its share.
    """
    mine, own, parts = share(traj, unit), (traj, fixed), []
    if mine is None or len(mine):
        own = own if mine is None else select(*own, mine)
        parts = micro_batches(own[0], unit, most, forward)
    count = max(group.exchange(len(parts), "the forwards of a minibatch")) if even else len(parts)
    for rows in parts:
        yield *(own if rows is None else select(*own, rows)), True
    for _ in range(count - len(parts)):
        rows = micro_batches(traj, unit, 1)[0]
        yield *((traj, fixed) if rows is None else select(traj, fixed, rows)), False


def micro_batches(traj: Trajectories, unit: str, most: int | None, forward: float | None = None) -> list[Tensor | None]:
    """Row indices of each forward within a minibatch, ``most`` rows or fewer; a single None is all at once.

    Texts of like length go together, so that little is padded; with ``forward`` (:func:`cost_of_a_forward`) they are
    cut without ``most`` too, where that saves more padding than it costs. With unit "group" groups stay whole, so a
    group larger than ``most`` makes a larger forward.
    """
    is_text = traj.prompt is not None and unit != "group"
    if most is None and is_text and forward is not None:
        most = _rows_worth_a_forward(traj, forward)
    if most is None or most >= len(traj):
        return [None]
    rows = torch.arange(len(traj), device=traj.mask.device)
    if is_text:
        rows = traj.response_lengths.argsort(stable=True)
    if unit != "group":
        return list(rows.split(most))
    found, inverse = groups(traj)
    chunks: list[list[Tensor]] = [[]]
    for number in range(len(found)):
        members = rows[inverse == number]
        if chunks[-1] and sum(map(len, chunks[-1])) + len(members) > most:
            chunks.append([])
        chunks[-1].append(members)
    return [torch.cat(chunk) for chunk in chunks]


def cost_of_a_forward(module: nn.Module) -> float | None:
    """Tokens that take as long as starting the operations of each weight, forward and backward; None if unknown."""
    sizes = [p.numel() for p in module.parameters()]
    on_cpu = next(module.parameters()).device.type == "cpu"
    return START * len(sizes) / sum(sizes) if on_cpu else None


def _rows_worth_a_forward(traj: Trajectories, forward: float) -> int:
    """Rows per equal part, by length, for which a batch of texts costs the fewest tokens, padding and forwards
    included."""
    assert traj.prompt is not None
    order = traj.response_lengths.argsort(stable=True)
    response, prompt = traj.response_lengths[order], (traj.prompt >= 0).sum(dim=1)[order]

    def tokens(rows: int) -> float:
        parts = zip(response.split(rows), prompt.split(rows), strict=True)
        return sum(forward + len(r) * int(r.max() + p.max()) for r, p in parts)

    return min((-(-len(traj) // parts) for parts in PARTS), key=tokens)


def flatten_fixed(fixed: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Flatten tensors as ``Trajectories.flatten`` does: ``(B, T, ...)`` to ``(N, 1, ...)``, a row per real step, and
    ``(B,)`` to ``(N,)``."""
    lengths = mask.sum(dim=1)
    return {
        name: x.repeat_interleave(lengths, dim=0) if x.ndim == 1 else x[mask].unsqueeze(1) for name, x in fixed.items()
    }
