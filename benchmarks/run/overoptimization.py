"""Over-optimisation of reward models (Gao, Schulman and Hilton 2022, "Scaling laws for reward model overoptimization").

Reward models are trained on more and more of the same comparisons; each is then optimised by best-of-n and by an
algorithm of the registry, without a KL penalty, and what it says (proxy) is drawn with what the judge says (gold)
against the square root of the KL from the start. Scores are gains over the start, each in units of its standard
deviation there.

.. code-block:: text

    <out>/
        overoptimisation.json   settings, every point, the fits
        overoptimisation.png    the drawing
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.algos.best_of_n import kl_bound
from lm_envs.algos.engine import judged_pairs
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.names import load_task
from lm_envs.benchmarks.run.overrides import check_overrides
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.reward.base import call_reward
from lm_envs.reward.learned import LearnedReward
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.reviews import annotate
from lm_envs.trajectories import Trajectories

_SAMPLES_SEED = 1 << 42  # of best-of-n's samples; training draws others
FLOOR = -1.0  # a gold that fell by a standard deviation: beyond, texts are of no kind that the fits were made for


@dataclass(frozen=True)
class Settings:
    """What is optimised, how far, and how it is measured.

    Attributes:
        pairs: sizes of the reward models' data; each is the first so many of the same comparisons.
        held_out: pairs that measure the reward models.
        flip: probability that an annotator's choice is recorded the wrong way round.
        algorithm, overrides, iterations: what optimises each reward model, a registered algorithm that samples.
        prompts, samples: of best-of-n: test prompts, and responses to each, of which n are a subset.
        reward_model: options of :func:`lm_envs.algos.engine.judged_pairs.make_reward_model`.
        seed: decides everything.
    """

    pairs: tuple[int, ...] = (500, 2000, 8000)
    held_out: int = 512
    flip: float = 0.25
    algorithm: str = "ppo"
    overrides: dict[str, Any] = field(default_factory=dict)
    iterations: int = 60
    prompts: int = 64
    samples: int = 128
    reward_model: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError where a number is too small."""
        if not self.pairs or min(self.pairs) < 2:
            raise ValueError(f"pairs must be sizes of at least 2, got {self.pairs}")
        for name in ("held_out", "iterations", "prompts", "samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")


@dataclass
class Curve:
    """Proxy and gold on the way of one optimiser against one reward model, K points.

    Attributes:
        pairs: what the reward model was trained on.
        accuracy: how often it orders held-out pairs as the judge does.
        method: "best-of-n" or the algorithm.
        kl: nats per response; of best-of-n the bound ``log n - (n-1)/n``.
        proxy, gold: gains over the start, in the start's standard deviations.
        fit: Gao et al.'s ``alpha`` and ``beta`` of the gold, and ``r2``, over the first :meth:`fitted` points.
    """

    pairs: int
    accuracy: float
    method: str
    kl: list[float]
    proxy: list[float]
    gold: list[float]
    fit: dict[str, float] = field(default_factory=dict)

    def fitted(self) -> int:
        """How many points there are before the gold first falls below :data:`FLOOR`."""
        return next((i for i, gold in enumerate(self.gold) if gold < FLOOR), len(self.gold))


def fit(kl: Sequence[float], gold: Sequence[float], method: str) -> dict[str, float]:
    """``R(d) = d (alpha - beta d)`` for best-of-n, ``d (alpha - beta log d)`` for the rest, ``d = sqrt(KL)`` (Gao et
    al. 2022, section 3.1), by least squares. Points without KL, where both are 0 by definition, do not count.

    Returns:
        alpha, beta and r2, the share of the gold's variance that is explained; NaN with fewer than two points.
    """
    d, y = np.sqrt(np.maximum(kl, 0)), np.asarray(gold, dtype=np.float64)
    d, y = d[d > 0], y[d > 0]
    if len(d) < 2:
        return {"alpha": math.nan, "beta": math.nan, "r2": math.nan}
    columns = np.stack([d, -bend(d, method)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, y, rcond=None)
    left = ((y - columns @ [alpha, beta]) ** 2).sum()
    r2 = float(1 - left / max(((y - y.mean()) ** 2).sum(), 1e-12))
    return {"alpha": float(alpha), "beta": float(beta), "r2": r2}


def bend(d: NDArray[np.float64], method: str) -> NDArray[np.float64]:
    """The shape that a fit gives a method: d of best-of-n, log d of RL."""
    return d * d if method == "best-of-n" else d * np.log(np.maximum(d, 1e-12))


def best_of_subsets(proxy: NDArray[np.float64], value: NDArray[np.float64], n: int) -> float:
    """The value of the best by proxy of n samples, a mean over all subsets of n of a prompt's samples and over prompts
    (Nakano et al. 2021, "WebGPT", appendix I).

    ``sum_i value_(i) C(i-1, n-1) / C(S, n)``, ``value_(i)`` of the sample with the i-th smallest proxy.

    Args:
        proxy, value: ``(prompts, S)``.
        n: at most S.
    """
    samples = proxy.shape[1]
    ranked = np.take_along_axis(value, proxy.argsort(axis=1, kind="stable"), axis=1)
    weights = np.array([math.comb(i, n - 1) for i in range(samples)], dtype=object) / math.comb(samples, n)
    return float((ranked * weights.astype(np.float64)).sum(axis=1).mean())


def judged(task: TextTask, env: TextVectorEnv, traj: Trajectories) -> NDArray[np.float64]:
    """``(B,)`` the judge's scores of a batch."""
    assert traj.prompt is not None and traj.response is not None
    response = traj.response.numpy()
    ids = [row[row >= 0].tolist() for row in response]
    prompt = traj.prompt.numpy()
    texts, reasons = env.mdp.texts(prompt, response), env.mdp.finish_reasons(response)
    found = call_reward(task.judge, *texts, ids, reasons, **env.mdp.columns(prompt))  # type: ignore[arg-type]
    return found.sum(axis=1) if found.ndim == 2 else found


def measure(name: str, options: dict[str, Any], settings: Settings, say: Callable[[str], None]) -> list[Curve]:
    """All curves of a task.

    Raises:
        UserError: the task has no judge, or no learned reward model to take the architecture from.
    """
    task = load_task(name, options)
    if task.judge is None or not isinstance(task.reward, LearnedReward):
        raise UserError(f"over-optimisation of task {name!r} needs a judge and a learned reward model")
    if not task.reward.is_plain:
        raise UserError(f"over-optimisation trains reward models of plain text, unlike {task.reward.__name__!r}")
    template: LearnedReward = task.reward
    env = TextVectorEnv(task)
    start = LMPolicy.for_mdp(env.mdp, task.start)
    say("sampling pairs to compare")
    most = max(settings.pairs)
    compared = judged_pairs.compare(env.mdp, start, 0, most, settings.seed)
    held = judged_pairs.compare(env.mdp, start, most, settings.held_out, settings.seed)
    texts, units = (judged_pairs.as_read(template, x.samples) for x in (compared, held))
    chosen = annotate(compared.gold[:, 0], compared.gold[:, 1], flip=settings.flip, seed=settings.seed)
    moments = float(held.gold.mean()), max(float(held.gold.std()), 1e-12)
    many = _many(task, start, settings)
    curves = []
    for pairs in sorted(settings.pairs):
        say(f"a reward model on {pairs} pairs")
        model = judged_pairs.make_reward_model(
            template.model, texts[:pairs], chosen[:pairs], seed=settings.seed, **settings.reward_model
        )
        reward = judged_pairs.in_units_of(template, model, units, f"reward_model_{pairs}")
        accuracy = judged_pairs.accuracy(held, reward)
        with_it = replace(task, reward=reward)
        curves.append(_best_of_n(with_it, many, moments, Curve(pairs, accuracy, "best-of-n", [], [], [])))
        say(f"{settings.algorithm} against it")
        curves.append(_trained(with_it, settings, moments, Curve(pairs, accuracy, settings.algorithm, [], [], [])))
    for curve in curves:
        count = curve.fitted()
        curve.fit = fit(curve.kl[:count], curve.gold[:count], curve.method)
    return curves


Many = tuple[TextVectorEnv, Trajectories, NDArray[np.float64]]


def _many(task: TextTask, policy: LMPolicy, settings: Settings) -> Many:
    """Samples of the start for best-of-n, grouped by prompt, and their gold scores ``(prompts, samples)``."""
    env = TextVectorEnv(task, split="test", group_size=settings.samples)
    count, seed = settings.samples, settings.seed + _SAMPLES_SEED
    parts = [rollout(env, policy, episodes=count, first_episode=i * count, seed=seed) for i in range(settings.prompts)]
    traj = Trajectories.concatenate(parts)
    return env, traj, judged(task, env, traj).reshape(settings.prompts, settings.samples)


def _best_of_n(
    task: TextTask,
    many: Many,
    moments: tuple[float, float],
    curve: Curve,
) -> Curve:
    env, traj, gold = many
    assert traj.prompt is not None and traj.response is not None
    scorer = TextVectorEnv(task, split="test").mdp
    proxy = scorer.score(traj.prompt.numpy(), traj.response.numpy()).sum(axis=1).reshape(gold.shape)
    n = 1
    while n <= gold.shape[1]:
        curve.kl.append(kl_bound(n))
        curve.proxy.append(best_of_subsets(proxy, proxy, n) - float(proxy.mean()))
        curve.gold.append((best_of_subsets(proxy, gold, n) - float(gold.mean())) / moments[1])
        n *= 2
    return curve


def _trained(task: TextTask, settings: Settings, moments: tuple[float, float], curve: Curve) -> Curve:
    """Points are training batches as sampled, before they are learned from."""
    options = {"kl_coef": 0.0, **settings.overrides, "iterations": settings.iterations, "seed": settings.seed}
    overrides = check_overrides(settings.algorithm, options)
    policy = LMPolicy.for_mdp(TextVectorEnv(task).mdp, copy.deepcopy(task.start).requires_grad_(True))
    agent = make_agent(settings.algorithm, policy, task, **overrides)
    env = TextVectorEnv(task, group_size=agent.config.group_size)
    for _ in range(settings.iterations):
        traj, metrics = agent.iteration(env)
        curve.kl.append(metrics["kl"])
        curve.proxy.append(metrics["score"])
        curve.gold.append((float(judged(task, env, traj).mean()) - moments[0]) / moments[1])
    return curve
