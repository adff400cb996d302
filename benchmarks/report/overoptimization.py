"""Over-optimization of reward models (Gao, Schulman and Hilton 2022, "Scaling laws for reward model overoptimization").

Reward models are trained on more and more of the same comparisons; each is then optimized by best-of-n and by an
algorithm of the registry, without a KL penalty. Its scores (proxy) are drawn with the judge's (gold) against the square
root of the KL from the start. Scores are gains over the start, in units of their standard deviation there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
from annotated_types import MinLen
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lm_envs.algos.best_of_n import kl_bound
from lm_envs.algos.engine import judged_pairs
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.measure.samples import judged
from lm_envs.benchmarks.report.plots import STYLE, as_file, root
from lm_envs.benchmarks.run.compare import gone_if_refused
from lm_envs.benchmarks.run.inputs import fingerprints
from lm_envs.benchmarks.run.names import base_task, check_task
from lm_envs.benchmarks.run.one_run import versions
from lm_envs.benchmarks.run.storage import write_json
from lm_envs.benchmarks.run.suites import Plan, RunSpec, check_overrides
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.files import write_atomic
from lm_envs.reward.learned import LearnedReward
from lm_envs.settings import Probability, Seed, Several
from lm_envs.settings import Settings as CheckedSettings
from lm_envs.tasks import load
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.reviews import annotate
from lm_envs.trajectories import Trajectories

_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
_SAMPLES_SEED = 1 << 42  # of best-of-n's samples; training draws others
FLOOR = -1.0  # gold fell by a standard deviation: beyond, texts are unlike those that the fits are for


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """The reward models, and the optimizers: best-of-n and a registered algorithm that samples."""

    pairs: Annotated[tuple[Several, ...], MinLen(1)] = (500, 2000, 8000)  # for each model a prefix of the same ones
    held_out: Several = 512  # pairs that measure the reward models
    flip: Probability = 0.25  # of recording an annotator's choice the wrong way round
    algorithm: str = "ppo"
    overrides: dict[str, Any] = field(default_factory=dict)
    iterations: Several = 60
    prompts: Several = 64  # test prompts of best-of-n
    samples: Several = 128  # responses to each
    reward_model: dict[str, Any] = field(default_factory=dict)  # options of judged_pairs.make_reward_model
    seed: Seed = 0


@dataclass
class Curve:
    """Proxy and gold of one optimizer against one reward model: gains over the start, in its standard deviations."""

    pairs: int  # comparisons that the reward model was trained on
    accuracy: float  # how often it orders held-out pairs as the judge does
    method: str  # "best-of-n" or the algorithm
    kl: list[float] = field(default_factory=list)  # nats per response; for best-of-n the bound ``log n - (n-1)/n``
    proxy: list[float] = field(default_factory=list)
    gold: list[float] = field(default_factory=list)
    fit: dict[str, float] = field(default_factory=dict)  # Gao et al.'s alpha, beta and r2 of the gold, up to fitted()

    def fitted(self) -> int:
        """Count the points before the gold first falls below :data:`FLOOR`."""
        return next((i for i, gold in enumerate(self.gold) if gold < FLOOR), len(self.gold))


def fit(kl: Sequence[float], gold: Sequence[float], method: str) -> dict[str, float]:
    """Fit ``R(d) = d (alpha - beta d)`` for best-of-n, ``d (alpha - beta log d)`` for the rest, ``d = sqrt(KL)`` (Gao
    et al. 2022, section 3.1), by least squares. Points without KL, where both are 0 by definition, do not count.

    Returns:
        alpha, beta and r2, the explained share of the gold's variance; NaN with fewer than two points.
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
    """Return the term of beta in the fit of a method: ``d^2`` for best-of-n, ``d log d`` for RL."""
    return d * d if method == "best-of-n" else d * np.log(np.maximum(d, 1e-12))


def best_of_subsets(proxy: NDArray[np.float64], value: NDArray[np.float64], n: int) -> float:
    """Average the value of the sample with the best proxy over all subsets of n of a prompt's samples, and over prompts
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


def measure(name: str, options: dict[str, Any], settings: Settings, say: Callable[[str], None]) -> list[Curve]:
    """Measure all curves of a task.

    Raises:
        UserError: the task has no judge, or no learned reward model to take the architecture from.
    """
    task = load(base_task(name)[0], **options)
    template = task.reward
    if task.judge is None or not isinstance(template, LearnedReward):
        raise UserError(f"over-optimisation of task {name!r} needs a judge and a learned reward model")
    if not template.is_plain:
        raise UserError(f"over-optimisation trains reward models of plain text, unlike {template.__name__!r}")
    env = TextVectorEnv(task)
    start = LMPolicy.for_mdp(env.mdp, task.start)
    say("sampling pairs to compare")
    most = max(settings.pairs)
    compared = judged_pairs.judge_pairs(env.mdp, start, 0, most, settings.seed)
    held = judged_pairs.judge_pairs(env.mdp, start, most, settings.held_out, settings.seed)
    texts, units = compared.read_by(template), held.read_by(template)
    chosen = annotate(compared.gold[:, 0], compared.gold[:, 1], flip=settings.flip, seed=settings.seed)
    moments = float(held.gold.mean()), max(float(held.gold.std()), 1e-12)
    many = _many(task, start, settings)
    curves = []
    for pairs in sorted(settings.pairs):
        say(f"a reward model on {pairs} pairs")
        given = (template, texts[:pairs], chosen[:pairs], units, f"reward_model_{pairs}")
        reward = judged_pairs.make_reward_model(*given, seed=settings.seed, **settings.reward_model)
        accuracy = held.accuracy(reward)
        with_it = replace(task, reward=reward)
        curves.append(_best_of_n(with_it, *many, moments[1], Curve(pairs, accuracy, "best-of-n")))
        say(f"{settings.algorithm} against it")
        curves.append(_trained(with_it, settings, moments, Curve(pairs, accuracy, settings.algorithm)))
    for curve in curves:
        count = curve.fitted()
        curve.fit = fit(curve.kl[:count], curve.gold[:count], curve.method)
    return curves


def _many(task: TextTask, policy: LMPolicy, settings: Settings) -> tuple[Trajectories, NDArray[np.float64]]:
    """Sample the start for best-of-n, grouped by prompt; with the gold scores ``(prompts, samples)``."""
    env = TextVectorEnv(task, split="test", group_size=settings.samples)
    count, seed = settings.samples, settings.seed + _SAMPLES_SEED
    parts = [rollout(env, policy, episodes=count, first_episode=i * count, seed=seed) for i in range(settings.prompts)]
    traj = Trajectories.concatenate(parts)
    return traj, judged(env.mdp, traj)[1].reshape(settings.prompts, settings.samples)


def _best_of_n(task: TextTask, traj: Trajectories, gold: NDArray[np.float64], unit: float, curve: Curve) -> Curve:
    """Add a point for each power of two up to the number of samples, with the gold in this unit."""
    assert traj.prompt_index is not None and traj.response is not None
    scorer = TextVectorEnv(task, split="test").mdp
    proxy = scorer.score(traj.prompt_index.numpy(), traj.response.numpy()).sum(axis=1).reshape(gold.shape)
    for n in (2**i for i in range(gold.shape[1].bit_length())):
        curve.kl.append(kl_bound(n))
        curve.proxy.append(best_of_subsets(proxy, proxy, n) - float(proxy.mean()))
        curve.gold.append((best_of_subsets(proxy, gold, n) - float(gold.mean())) / unit)
    return curve


def _trained(task: TextTask, settings: Settings, moments: tuple[float, float], curve: Curve) -> Curve:
    """Add a point for each training batch as it was sampled, before the update."""
    options = {"kl_coef": 0.0, **settings.overrides, "iterations": settings.iterations}
    overrides = check_overrides(settings.algorithm, options) | {"seed": settings.seed}
    policy = LMPolicy.for_mdp(TextVectorEnv(task).mdp, copy.deepcopy(task.start).requires_grad_(True))
    agent = make_agent(settings.algorithm, policy, task, **overrides)
    env = TextVectorEnv(task, group_size=agent.config.group_size)
    for _ in range(settings.iterations):
        traj, metrics = agent.iteration(env)
        curve.kl.append(metrics["kl"])
        curve.proxy.append(metrics["score"])
        curve.gold.append((float(judged(env.mdp, traj)[1].mean()) - moments[0]) / moments[1])
    return curve


def draw(curves: Sequence[Curve]) -> Figure:
    """Draw a panel per method: gold (dots, its fit a line) and proxy (dashed) against the square root of the KL, a
    color per reward model. Only the beginning of what lies below :data:`FLOOR` is shown."""
    methods = list(dict.fromkeys(curve.method for curve in curves))
    sizes = sorted({curve.pairs for curve in curves})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5 * len(methods), 4.6), layout="constrained")
        axes: Sequence[Axes] = figure.subplots(1, len(methods), squeeze=False)[0]
        for ax, method in zip(axes, methods, strict=True):
            shown = [c for c in curves if c.method == method]
            for curve in shown:
                color, d = _COLORS[sizes.index(curve.pairs) % len(_COLORS)], root(np.array(curve.kl))
                label = f"{curve.pairs:,} pairs ({curve.accuracy:.0%} ordered correctly)"
                ax.plot(d, curve.proxy, "--", color=color, linewidth=1.2)
                ax.plot(d, curve.gold, "o", color=color, markersize=3.5, label=label)
                if math.isfinite(curve.fit.get("alpha", math.nan)):
                    x = np.linspace(0, d[: curve.fitted()].max(), 200)
                    y = curve.fit["alpha"] * x - curve.fit["beta"] * bend(x, method)
                    ax.plot(x, y, "-", color=color, linewidth=2)
            if any(curve.fitted() < len(curve.gold) for curve in shown):
                ax.set_ylim(bottom=2 * FLOOR)
                ax.set_xlim(right=1.15 * max(math.sqrt(max(0.0, *c.kl[: c.fitted() + 1])) for c in shown))
                ax.set_ylim(top=1.1 * max(max(c.proxy[: c.fitted() + 1]) for c in shown))
            ax.axhline(0, color="#888888", linewidth=1)
            ax.set_title(f"{method}: {'d(α - β d)' if method == 'best-of-n' else 'd(α - β log d)'}")
            ax.set_xlabel("d = √KL from the start (KL in nats per response)")
            ax.legend(frameon=False, fontsize=9)
        axes[0].set_ylabel("gain over the start, standard deviations\n(dots: gold, lines: its fit, dashed: proxy)")
    return figure


def overoptimise(
    task: str, options: dict[str, Any], settings: Settings, out: Path, say: Callable[[str], None] = lambda text: None
) -> list[Curve]:
    """Measure, and write ``overoptimisation.json`` (settings, every point, the fits) and ``overoptimisation.png``."""
    check_task(task)
    check_overrides(settings.algorithm, settings.overrides)
    with gone_if_refused(out):
        curves = measure(task, options, settings, say)
    spec = RunSpec(task, settings.algorithm, settings.seed, Plan(), options=options)
    found = {"task": task, "options": options, "settings": asdict(settings), "curves": [asdict(c) for c in curves]}
    write_json(out / "overoptimisation.json", found | {"inputs": fingerprints(spec), "versions": versions()})
    write_atomic(out / "overoptimisation.png", as_file(draw(curves), "png"))
    return curves
