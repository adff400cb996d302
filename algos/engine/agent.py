"""The engine every algorithm shares: sampling, minibatches, micro-batches, Adam, counters and checkpoints.

An algorithm is two hooks, ``prepare`` (once per batch, no gradients) and ``loss`` (per minibatch, differentiable), and
the unit that its loss averages over. The result does not depend on the micro-batch size or on being killed (laws 8 and
10 in docs/laws.md).
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from lm_envs.algos.engine.batching import (
    Before,
    cost_of_a_forward,
    flatten_fixed,
    mismatch,
    own_parts,
    passes,
    select,
    units,
)
from lm_envs.algos.engine.comparisons import annotated_pairs
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.demonstrations import demonstrations_of, likelihood
from lm_envs.algos.engine.kl_coefficient import KLCoefficient
from lm_envs.algos.engine.metrics import Averages, Metric
from lm_envs.algos.engine.optimizer import make_adam, take_back, tensors_of
from lm_envs.algos.engine.sampling import Sampler, draw
from lm_envs.algos.engine.shards import weights_of
from lm_envs.algos.ops.losses import explained_variance
from lm_envs.algos.policies.adaptation import frozen_hash
from lm_envs.processes.group import alone, exchange
from lm_envs.tasks.base import TextTask
from lm_envs.training import add_gradients, stream
from lm_envs.trajectories import Trajectories

_SAMPLED = ("episodes_done", "samples_done", "tokens_done", "steps_done", "reward_calls", "scored_tokens")
_COUNTERS = ("iterations_done", *_SAMPLED, "comparisons_done", "trained_tokens")
_WEIGHTS = itertools.count()  # numbers of weights: equal numbers, equal weights

C = TypeVar("C", bound=AgentConfig)


class Agent(Generic[C]):
    """An algorithm: subclass, set ``Config``, ``name`` and ``unit``, and write ``prepare`` and ``loss``.

    Attributes:
        unit: what ``loss`` averages over: "token" (real steps), "sequence" (rows) or "group" (rows with the same
            ``group``; never split over minibatches). Parts of a batch are weighted by their share of it.
        whole_batch: the steps of a pass, together, weigh each unit of the batch alike; else each step is a mean over
            the units of its own minibatch, which may be more or fewer than those of another.
        needs_data: it learns from Trajectories given to it as ``data``, not by sampling.
        data: what an agent that needs data learns from, ``config.episodes`` at a time.
        preference_data: its data are preferences, which simulated annotators can make for any text task.
        mixes_data: it samples, and may also learn from demonstrations given to it as ``data``.
        reference: a policy whose ``evaluate(traj).log_probs()`` is the reference's distribution; None takes the text
            env's at the first iteration.
        progress: the share of a budget in another unit than iterations that is spent; None counts iterations.
        missing: rows of this iteration that :meth:`select` left to sample; None before it was asked.
        mdp: that of the text env, for an agent that scores texts of its own; None takes it at the first iteration.
        published_kl_coef: for where neither its config nor the env names a coefficient; None takes the task's.
        iterations_done, episodes_done, tokens_done, reward_calls: counters of what was learned from.
        steps_done: env steps taken, those of surplus episodes included.
        samples_done: episodes sampled, those that annotators compared included.
        scored_tokens: tokens of prompts and sampled responses that the reward read, those that the reference read, and
            those that a critic with a model of its own read.
        comparisons_done: pairs that annotators compared during the run, and that something was trained on.
        trained_tokens: response tokens (steps on control) evaluated with a gradient; each pass counts.
        given: what its data took, see :mod:`lm_envs.algos.engine.cost`.
    """

    Config: ClassVar[type[AgentConfig]] = AgentConfig
    name: ClassVar[str] = "agent"
    unit: str = "token"
    whole_batch: bool = False
    needs_data: ClassVar[bool] = False
    preference_data: ClassVar[bool] = False
    mixes_data: ClassVar[bool] = False
    published_kl_coef: ClassVar[float | None] = None
    reference: Any = None
    mdp: Any = None
    data: Any = None
    missing: int | None = None
    progress: float | None = None

    @classmethod
    def lacks(cls, task: TextTask, config: Any) -> str | None:
        """What it needs of a task that the task does not have, in words; None where it can learn from it."""
        return None

    def __init__(self, policy: nn.Module, config: C | None = None) -> None:
        self.policy: Any = policy.eval()
        self.config: C = config if config is not None else self.Config()  # type: ignore[assignment]
        self._parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError(f"{self.name}: the policy has no parameter that requires a gradient")
        self._trained = weights_of(policy)
        self.optimizer = make_adam(self._trained.parameters, self.name, self.config.learning_rate, self.config.adam_eps)
        self.iterations_done = self.episodes_done = self.samples_done = self.tokens_done = self.steps_done = 0
        self.reward_calls = self.scored_tokens = self.comparisons_done = self.trained_tokens = 0
        self.given: Mapping[str, int] = {}
        self._kl = KLCoefficient(self.name, self.published_kl_coef)
        self._weights = next(_WEIGHTS)
        self._first_step = self._same = False
        self.forward_cost = cost_of_a_forward(policy)
        self.sampler = Sampler(self.name, self.policy)
        self._frozen: str | None = None  # the hash of the policy's frozen parameters
        self._batches: Iterator[Trajectories] | None = None

    # ---- what an algorithm writes ----

    @classmethod
    def data_of(cls, task: TextTask, config: Any) -> Trajectories | None:
        """What it learns from where no data are given; None if the task has no such thing."""
        if cls.preference_data:
            return annotated_pairs(task, config.pairs, config.flip, config.seed)
        return demonstrations_of(task)

    @classmethod
    def prepare_policy(cls, policy: Any, task: Any, config: Any) -> None:
        """Give the policy what this algorithm takes from a task; the registry calls it before it makes the agent."""

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        """What the loss treats as constant; called once per batch, without gradients.

        Returns:
            tensors ``(B,)`` or ``(B, T, ...)``; of one named ``target``, the critic's explained variance is logged.
        """
        return {}

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        """The loss of the rows given, a mean over ``unit``, and metrics (see :class:`Averages`)."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def batches(self) -> Iterator[Trajectories] | None:
        """Batches to learn from instead of sampling, from iteration ``iterations_done`` on; None samples from the env.

        By default passes over :attr:`data`, each in an order that depends only on the seed and the pass.
        """
        if not self.needs_data:
            return None
        size = self.config.episodes
        assert size is not None
        order = stream(len(self.data), size, self.config.seed, self.iterations_done)
        return (self.data.select(torch.from_numpy(index)) for index in order)

    def select(self, traj: Trajectories) -> Tensor | None:
        """Rows of a sampled batch to learn from, int64 indices or a bool mask ``(B,)``; None keeps all.

        Everything sampled is counted and charged. With ``draws`` the rows that are missing are sampled again, as new
        episodes. The metric ``dropped`` is the share of sampled rows that are not learned from.
        """
        return None

    def rows_of(self, data: Any) -> Any:
        """What batches of such data are drawn from: ``len`` counts its units, ``select`` returns some of them."""
        return data

    def mixture(self, step: int) -> tuple[float, Trajectories] | None:
        """The weight of ``-log pi`` and demonstrations to learn from beside minibatch number ``step`` of the run."""
        return None

    def after_iteration(self) -> None:
        """Called at the end of every iteration."""

    def should_stop(self, metrics: dict[str, float]) -> bool:
        """Whether to leave this batch alone from here on, given a minibatch's metrics; asked before its Adam step."""
        return False

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """More state for a checkpoint: tensors, and values in JSON's types."""
        return {}, {}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take back what :meth:`extra_state` gave."""

    @property
    def uses_reward(self) -> bool:
        """Whether it learns from the env's reward, so that what that was made of is part of its cost."""
        return not self.needs_data

    # ---- the engine ----

    def update(self, traj: Trajectories) -> dict[str, float]:
        """Learn from a batch: evaluate, prepare, then epochs x minibatches x micro-batches, an Adam step per minibatch.

        Raises:
            FloatingPointError: a loss or a gradient is NaN or infinite; its step is not taken.
        """
        config, start = self.config, time.perf_counter()
        self.policy.eval()
        first = next(iter(self._parameters.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        kept = traj.sampled_by is not None and bool((traj.sampled_by == self._weights).all())
        if traj.mask.device != first.device:
            traj = traj.to(first.device)
        before = Before(self.policy, traj, config.micro_batch, kept=kept)
        with torch.no_grad():
            # Returns are summed in the batch's float64; the loss works in the policy's precision.
            prepared = self.prepare(traj, before)
            fixed = {name: x.to(dtype) if x.is_floating_point() else x for name, x in prepared.items()}
        metrics: dict[str, float] = {}
        if before.knows_value and "target" in fixed:
            known = explained_variance(before.value[:, :-1], fixed["target"], traj.mask)
            metrics["explained_variance"] = float(known)
        # Law 7: the policy that learns is the one that sampled. Above rounding, something differs between the two.
        self._first_step, self._same = traj.logprob is not None, kept or before.was_read
        if self.unit == "token" and not self.policy.sequence_obs:
            fixed = flatten_fixed(fixed, traj.mask)
            traj = traj.flatten()
        self.optimizer.param_groups[0]["lr"] = metrics["learning_rate"] = self.learning_rate
        averages, steps = Averages(), 0
        self._units_per_step = units(traj, self.unit) / config.minibatches if self.whole_batch else None
        with self._trained.updating(() if self.mdp is None else self.mdp.task.models):
            for epoch, number, index in passes(traj, self.unit, config, self.iterations_done):
                part, held = (traj, fixed) if index is None else select(traj, fixed, index)
                if self._step(part, held, averages, epoch, number):
                    break
                steps += 1
        self.iterations_done += 1
        metrics["updates"] = steps
        return metrics | averages.means() | {"update_s": time.perf_counter() - start}

    @property
    def learning_rate(self) -> float:
        """Adam's step size in the iteration that comes next."""
        done = self.iterations_done / self.config.iterations if self.progress is None else self.progress
        left = 1 - done if self.config.anneal else 1.0
        return self.config.learning_rate * max(left, 0.0)

    def _step(self, traj: Trajectories, fixed: dict[str, Tensor], averages: Averages, epoch: int, number: int) -> bool:
        """One minibatch. Returns True, having changed nothing, where :meth:`should_stop` says so."""
        self.optimizer.zero_grad(set_to_none=True)
        mine, mixed = Averages(), Averages()
        weight = 1.0 if self._units_per_step is None else units(traj, self.unit) / self._units_per_step
        try:
            add_gradients(self._losses("loss", traj, fixed, self.unit, self.loss, mine, weight))
            mine = Averages().join(*exchange(mine, "the metrics of a minibatch"))
            averages.join(mine)
            if self.should_stop(mine.means()):
                self.optimizer.zero_grad(set_to_none=True)
                return True
            if (mixture := self.mixture(number)) is not None:
                weight, data = mixture
                unit = "token" if self.unit == "token" else "sequence"
                add_gradients(self._losses("demonstration_nll", data, {}, unit, likelihood(unit), mixed, weight))
                averages.join(*exchange(mixed, "the metrics of demonstrations"))
            norm = self._trained.step(self.optimizer, self.config.max_grad_norm)
        except FloatingPointError as error:
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"{self.name}: {error} in iteration {self.iterations_done}, epoch {epoch}; "
                f"{self._trained.after_failure}. Check rewards and log-probabilities, or lower learning_rate"
            ) from None
        self._weights = next(_WEIGHTS)
        averages.add({"grad_norm": norm}, 1.0)
        self._first_step = False  # from here on the policy is another one
        return False

    def _losses(
        self,
        name: str,
        traj: Trajectories,
        fixed: dict[str, Tensor],
        unit: str,
        loss_of: Callable[..., tuple[Tensor, dict[str, Metric]]],
        averages: Averages,
        weight: float = 1.0,
    ) -> Iterator[Tensor]:
        """This process's parts of a weighted mean over a minibatch's units, one per forward; their metrics are added to
        averages."""
        whole, even = units(traj, unit), self._trained.even
        self.trained_tokens += int(traj.response_lengths.sum())
        for part, held, counts in own_parts(traj, fixed, unit, self.config.micro_batch, self.forward_cost, even):
            with alone():  # each process has rows of its own
                now, count = self._trained.evaluate(part), units(part, unit)
                loss, metrics = loss_of(part, now, held)
            if self._first_step and part.logprob is not None:
                metrics = metrics | mismatch(now.logprob.detach(), part, self._same)
            # Law 8: each part counts by its share of all processes' units, so the sum is the mean over the minibatch.
            yield loss * (weight * (count / whole) if counts else 0.0)
            if counts:
                averages.add({name: loss.detach(), **metrics}, count)

    # ---- sampling ----

    def sample(self, env: Any) -> Trajectories:
        """A batch from the env, or where rows are :attr:`missing` that many; an override returns every row it samples,
        because ``episodes_done`` counts them: leave rows out in :meth:`select`."""
        config = self.config if self.missing is None else replace(self.config, episodes=self.missing)
        traj, steps = self.sampler.sample(env, config, self.episodes_done, self.iterations_done)
        self.steps_done += steps
        return traj

    @property
    def kl_in_reward(self) -> bool:
        """Whether the env charges the KL penalty; if not, it is a term of the loss and the env charges none."""
        return True

    def kl_coefficient(self) -> float:
        """The coefficient of a KL penalty in the loss; ValueError where nothing names one and no env was seen."""
        return self._kl.now(self.config)

    def settle_kl_coef(self, env: Any) -> float | None:
        """Put the KL coefficient into the env's MDP, keep that, and return it; see :class:`KLCoefficient`."""
        coef = self._kl.settle(env, self.config, self.kl_in_reward)
        self.mdp = self._kl.mdp or self.mdp
        return coef

    def iteration(self, env: Any = None) -> tuple[Trajectories, dict[str, float]]:
        """Sample a batch from a Gymnasium env or vector env (or take the next of :meth:`batches`), and learn from it.

        Returns:
            the batch, as sampled, and the iteration's metrics.
        """
        self._trained.check_held()
        start = time.perf_counter()
        metrics: dict[str, float] = {"iteration": self.iterations_done}
        self._batches = self._batches or self.batches()
        if self._batches is not None:
            traj = learned = next(self._batches)
        else:
            if env is None:
                raise ValueError(f"{self.name}.iteration needs an env to sample from")
            coef = self.settle_kl_coef(env)
            metrics |= {} if coef is None else {"kl_coef": coef}
            traj, learned, found = draw(self, env, self._weights)
            metrics |= found
        metrics["sample_s"] = time.perf_counter() - start
        if len(learned):
            metrics |= self.update(learned)
        else:
            self.iterations_done, metrics["updates"] = self.iterations_done + 1, 0
        if "kl" in metrics:
            self._kl.steer(metrics["kl"])
        self.after_iteration()
        metrics["tokens_per_second"] = float(traj.response_lengths.sum()) / (time.perf_counter() - start)
        shown = ("episodes_done", "steps_done", "tokens_done", "reward_calls", "scored_tokens", "trained_tokens")
        metrics |= {name.removesuffix("_done"): getattr(self, name) for name in shown}
        return traj, metrics

    # ---- checkpoints ----

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a run needs to continue bit for bit: tensors (for safetensors) and values in JSON's types.

        Of frozen parameters it holds only a hash. A control env's state cannot be saved, so sampling by ``steps``
        starts fresh episodes after a checkpoint, in the run that goes on as in one restored from it.
        """
        self.sampler.fragments = None
        counters: dict[str, Any] = {name: getattr(self, name) for name in _COUNTERS}
        counters["kl_coef"] = self._kl.steered
        if self._frozen is None:  # once: frozen parameters do not change
            self._frozen = frozen_hash(self.policy)
        if self._frozen is not None:
            counters["frozen_sha256"] = self._frozen
        more, counters["extra"] = self.extra_state()
        return tensors_of(self.policy, self._trained, self.optimizer, more), counters

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Take back a :meth:`checkpoint`; the agent then continues as the one that made it would have.

        Raises:
            ValueError: the checkpoint is of another policy, or of one with other frozen weights.
        """
        if counters.get("frozen_sha256") != frozen_hash(self.policy):
            raise ValueError(
                f"{self.name}: the checkpoint is of a policy with other frozen weights: start from the model it was "
                "trained on, with the same freeze_layers and lora_rank"
            )
        try:
            more = take_back(self.policy, self._trained, self.optimizer, tensors)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        self._weights = next(_WEIGHTS)
        for name in _COUNTERS:
            if name not in counters:
                raise ValueError(f"{self.name}: the checkpoint has no {name!r}: another version of lm-envs made it")
            setattr(self, name, counters[name])
        self._kl.restore(counters["kl_coef"], self.config)
        self.sampler.fragments = self._batches = None
        self.restore_extra(more, counters["extra"])


def learn(
    agent: Agent[Any],
    env: Any = None,
    iterations: int | None = None,
    callback: Callable[[Agent[Any], Trajectories, dict[str, float]], object] | None = None,
) -> Agent[Any]:
    """Run more iterations (None: up to the config's number), and ``callback(agent, traj, metrics)`` after each."""
    end = agent.config.iterations if iterations is None else agent.iterations_done + iterations
    while agent.iterations_done < end:
        traj, metrics = agent.iteration(env)
        if callback is not None:
            callback(agent, traj, metrics)
    return agent
