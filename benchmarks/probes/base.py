"""A probe: a sweep over texts that are solved exactly, and a score between what nothing learned and the optimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.settings_enumerable import TABULAR, VALUE_SCALE
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import Unsuited, load, make_agent
from lm_envs.env.mdp import TextMDP
from lm_envs.env.vector import TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.tasks import enumerable
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.enumerable import EnumerableConfig, TableReward

Array = NDArray[np.float64]
EPISODES = 4_096
"""The budget of a run: responses sampled and scored."""
BATCH = 128
"""Episodes of an iteration."""
KL_COEF = 0.02
"""beta, for rewards of 0 to 1: small, so that the score asks whether the reward was found, unless a probe says else."""
_GROUP: dict[str, Any] = {"group_size": 8, "learning_rate": 0.3}
_PROXIMAL: dict[str, Any] = {"epochs": 4, "learning_rate": 0.1}
_FAST: dict[str, Any] = {"learning_rate": 0.3}
_PAIRS: dict[str, Any] = {"episodes": BATCH, "pairs": EPISODES // 2, "learning_rate": 0.3}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("reinforce", "rloo", "bond", "dr-grpo", "grpo", "dapo", "gspo", "sapo", "cispo"), _GROUP),
    **dict.fromkeys(("reinforce-plus-plus-baseline", "online-dpo", "xpo"), _GROUP),
    **dict.fromkeys(("reinforce-plus-plus", "remax", "a2c"), _FAST),
    **dict.fromkeys(("ppo", "ppo-klpen"), _PROXIMAL),
    **dict.fromkeys(("dpo", "binary-feedme", "reward-conditioning"), _PAIRS),
    "vbon": {**_GROUP, "reference_samples": 64},
    "expert-iteration": {"group_size": 8, "learning_rate": 0.1},
    "quark": {"learn_episodes": 2 * BATCH, "minibatches": 2, "learning_rate": 0.3},
    "distillation": {"teacher": None},  # the optimum would teach it what a probe asks
}
"""What differs from the settings for a table on the enumerable task, because the budget is a 25th of theirs."""


@dataclass(frozen=True, eq=False)
class Case:
    """A probe at one value of its sweep: the texts, what they are worth, and what stands in a method's way.

    Attributes:
        rewards: ``(X, L)``, what each text is worth after each prompt, in the order of
            :class:`~lm_envs.tasks.enumerable.PrefixTree`; the score is made from these.
        tokens: n, besides EOS.
        horizon: T, the most tokens of a text.
        kl_coef: beta.
        ends: whether a text may end early with EOS; if not, all have T tokens.
        logits: ``(X, S, n + 1)`` of the reference; None is uniform.
        taught: the rewards ``(X, L)`` that training sees, given the share of the budget that is spent; None is
            ``rewards``. At the end it must be ``rewards``, or a proxy of them.
        noise: standard deviation of the normal noise that each training reward gets; a text gets a new draw every time.
        before: called with the policy and the number of the iteration before each, to plant a fault.
        settings: for algorithms that have settings of these names.
        needs: a setting without which the probe says nothing about an algorithm.
    """

    rewards: Array
    tokens: int
    horizon: int
    kl_coef: float = KL_COEF
    ends: bool = False
    logits: Array | None = None
    taught: Callable[[float], Array] | None = None
    noise: float = 0.0
    before: Callable[[TabularPolicy, int], object] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None


@dataclass(frozen=True)
class Probe:
    """A question about algorithms, asked at each value of a sweep.

    Attributes:
        name: a word or two, for tables and plots.
        axis: what the values are, with units.
        values: of the sweep, from easy to hard.
        case: makes the case of a value and a seed.
        text: what it shows; the module's docstring.
    """

    name: str
    axis: str
    values: tuple[float, ...]
    case: Callable[[float, int], Case]
    text: str


def texts(tokens: int, horizon: int) -> NDArray[np.int64]:
    """Return ``(L, T)``: the tokens of every text, without EOS, right-padded with -1, in the order of the rewards."""
    return EnumerableConfig(tokens=tokens, horizon=horizon).tree.texts().numpy()


def plain(seed: int, prompts: int = 4, tokens: int = 4, horizon: int = 3, **changes: Any) -> Case:
    """Return an easy case, in which a fault can be planted: the reward is the share of tokens that are right, in a text
    drawn for each prompt."""
    return Case(shares(np.random.default_rng(seed), prompts, tokens, horizon), tokens, horizon, **changes)


def shares(draws: np.random.Generator, prompts: int, tokens: int, horizon: int) -> Array:
    """Draw a text for each prompt; return ``(X, L)``, the share of its tokens that each text has in their places."""
    right = draws.integers(tokens, size=(prompts, 1, horizon))
    return (texts(tokens, horizon) == right).mean(axis=2)


class _Taught(TableReward):
    """The rewards of training: a table that may change, and noise."""

    def __init__(self, case: Case, task: TextTask, seed: int) -> None:
        tree = EnumerableConfig(tokens=case.tokens, horizon=case.horizon).tree
        super().__init__(case.rewards, task.tokenizer.batch_decode(task.prompts["train"]), tree)
        self.case, self._noise = case, np.random.default_rng((seed, 1))
        self.move(0.0)

    def move(self, spent: float) -> None:
        if self.case.taught is not None:
            self.table = self.case.taught(spent)

    def __call__(self, **arguments: Any) -> Array:
        found = super().__call__(**arguments)
        return found + self.case.noise * self._noise.standard_normal(len(found)) if self.case.noise else found


@dataclass(frozen=True, eq=False)
class Question:
    """A case with its task and its exact solution.

    Attributes:
        exact: by the rewards that count.
        start: J of the reference, the score's 0.
        optimum: J of the policy that is optimal for the rewards of training at the end, the score's 1.
    """

    case: Case
    task: TextTask
    exact: Exact
    start: float
    optimum: float

    def score(self, policy: Any) -> tuple[float, float]:
        """Return the score ``(J - start) / (optimum - start)``, cut to [0, 1], and J."""
        with torch.no_grad():
            value = float(self.exact.objective(policy))
        return min(max((value - self.start) / (self.optimum - self.start), 0.0), 1.0), value


def ask(case: Case) -> Question:
    """Make the task of a case and solve it."""
    tree = EnumerableConfig(tokens=case.tokens, horizon=case.horizon).tree
    logits = np.zeros((len(case.rewards), tree.prefixes, tree.vocab_size)) if case.logits is None else case.logits
    sizes = {"tokens": case.tokens, "horizon": case.horizon, "prompts": len(case.rewards), "kl_coef": case.kl_coef}

    def solved(rewards: Array) -> tuple[TextTask, Exact]:
        task = enumerable.load(logits, rewards, **sizes)
        task = task if case.ends else replace(task, min_new_tokens=case.horizon)
        return task, Exact(TextMDP(task))

    task, exact = solved(case.rewards)
    best = exact.optimal_policy if case.taught is None else solved(case.taught(1.0))[1].optimal_policy
    start, optimum = float(exact.reference_value), float(exact.objective(best))
    if not optimum > start:
        raise ValueError(f"a probe's optimum must be better than its start, but J is {optimum:.4g} and {start:.4g}")
    return Question(case, task, exact, start, optimum)


def settings(algorithm: str, case: Case) -> dict[str, Any]:
    """Return an algorithm's settings on a case: those for a table, at the probes' budget.

    Raises:
        Unsuited: the algorithm lacks the setting that the case needs.
    """
    config = load(algorithm).Config
    has = {each.name: each.default for each in fields(config)}
    if case.needs is not None and case.needs not in has:
        raise Unsuited(f"{algorithm} has no setting {case.needs!r}")
    group = _GROUP if has["group_size"] != 1 else _FAST  # for those that are not listed
    table = {"anneal": False, "max_grad_norm": 1e6, **TABULAR.get(algorithm, group)}
    here = {"episodes": BATCH, "kl_coef": case.kl_coef, "beta": case.kl_coef, **SETTINGS.get(algorithm, {})}
    found = {**table, **here, **case.settings}
    return {name: value for name, value in found.items() if name in has}


def run(question: Question, algorithm: str, seed: int) -> tuple[float, float]:
    """Train a table by an algorithm and return its score and J.

    Raises:
        Unsuited: the case does not suit the algorithm.
    """
    case = question.case
    reward = _Taught(case, question.task, seed)
    task = replace(question.task, reward=reward, judge=reward)
    policy = TabularPolicy(question.exact, value_scale=VALUE_SCALE)
    chosen = {"seed": seed, **settings(algorithm, case)}
    agent: Agent[Any] = make_agent(algorithm, policy, task, **chosen)
    agent.reference = TabularPolicy(question.exact)
    env = TextVectorEnv(task, group_size=agent.config.group_size)
    assert agent.config.episodes is not None
    count = max(1, EPISODES // agent.config.episodes)
    agent.config = replace(agent.config, iterations=count)
    # Some also sample beside their batches; those that learn from data sample nothing.
    while (spent := max(agent.samples_done / EPISODES, agent.iterations_done / count)) < 1:
        reward.move(spent)
        if case.before is not None:
            case.before(policy, agent.iterations_done)
        agent.iteration(env)
    return question.score(policy)
