"""What a run works on: a text task or a control environment, with its policy, its agent and its measurements."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lm_envs.algos.best_of_n import BestOfN
from lm_envs.algos.engine import cost
from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.settings_enumerable import TABULAR, VALUE_SCALE
from lm_envs.algos.policies.adaptation import Adaptation, adapted, save_model
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.measure import exact, samples
from lm_envs.benchmarks.run.names import base_task, best_of, is_control, load_task
from lm_envs.benchmarks.run.suites import RunSpec, check_overrides
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.trajectories import Trajectories


def open_problem(spec: RunSpec) -> TextProblem | ControlProblem:
    """The problem of a run, with its task loaded."""
    return ControlProblem(spec) if is_control(spec.task) else TextProblem(spec)


def _iterations(agent: Agent[Any], spec: RunSpec) -> int:
    """Those of the overrides, else of the plan, else as many as the plan's episodes need, else the algorithm's own."""
    if "iterations" in spec.overrides:
        return agent.config.iterations
    if spec.plan.iterations is not None:
        return spec.plan.iterations
    if spec.plan.episodes is None:
        return agent.config.iterations
    if agent.config.steps is not None or agent.config.episodes is None:
        raise UserError(f"{spec.label}: this algorithm samples steps, not whole episodes: set [budget] iterations")
    return math.ceil(spec.plan.episodes / agent.config.episodes)


def _fit(agent: Agent[Any], spec: RunSpec) -> Agent[Any]:
    """Its iterations, and no more episodes in each than there are to be in all, in whole groups."""
    config, most = agent.config, spec.plan.episodes
    by_episodes = "iterations" not in spec.overrides and spec.plan.iterations is None
    if by_episodes and most is not None and config.episodes is not None and config.episodes > most:
        config = replace(config, episodes=config.group_size * math.ceil(most / config.group_size))
    agent.config = config
    agent.config = replace(config, iterations=_iterations(agent, spec))
    return agent


class Problem(Protocol):
    """What runs ask of a problem: here where nothing is sampled and no language model comes of it.

    Attributes:
        agent: what trains, None for SFT itself and best-of-n.
        env: what it trains on, None where it needs none.
        policy: what is measured.
        given: what the data took that were there before the run: comparisons given, and those behind the reward.
    """

    agent: Any
    policy: Any
    env: Any = None
    given: Counter[str] = Counter()

    def settings(self) -> dict[str, Any]:
        """What ``config.json`` says beyond the spec."""

    def validate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """A point of the learning curve, measured alike each time, and some samples."""

    def evaluate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The result, and the samples it is the mean of."""

    def save_model(self, folder: Path) -> None:
        """The tuned model and the tokenizer, as transformers' ``from_pretrained`` reads them."""
        return None

    def texts(self, traj: Trajectories, count: int = 2) -> list[str]:
        """The first texts of a training batch, with their scores."""
        return []

    def costs(self, measured: dict[str, Any]) -> dict[str, int]:
        """What training and measuring took."""
        return cost.total(self.agent, self.given, measured)

    def sizes(self, model: Any, trained: Any = None) -> dict[str, int]:
        """How many numbers a model has, and how many of ``trained`` (the policy with its heads) are trained."""
        module = trained or (None if self.agent is None else self.policy)
        count = 0 if module is None else sum(p.numel() for p in module.parameters() if p.requires_grad)
        return {"parameters": sum(p.numel() for p in model.parameters()), "trainable_parameters": count}


class TextProblem(Problem):
    """A text task as an MDP or as a bandit env.

    Attributes:
        kl_coef: the KL coefficient that training starts with, None where training samples nothing.
        exact: where the task is solved exactly: then the policy is a table, with settings of its own, and what is
            measured are expectations.
    """

    tracked = ("gold", "proxy", "kl", "length")

    @property
    def given(self) -> Counter[str]:  # type: ignore[override]
        agent = self.agent
        found = Counter() if agent is None else Counter(agent.given)
        uses_reward = best_of(self.spec.algorithm) is not None if agent is None else agent.uses_reward
        if agent is not None and agent.preference_data and self.task.judge is None:
            uses_reward = True  # the annotators followed it
        return found + cost.of_reward(self.task) if uses_reward else found

    def __init__(self, spec: RunSpec) -> None:
        options = dict(spec.options)
        if base_task(spec.task)[0] == "custom":  # which checks what fits, and takes units, at these
            names = ("max_new_tokens", "min_new_tokens", "temperature")
            options |= {name: spec.env[name] for name in names if name in spec.env}
        self.spec, self.task = spec, load_task(spec.task, options)
        # TOML and JSON have no tuples
        self._options: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in spec.env.items()}
        self._measures: dict[str, TextVectorEnv] = {}
        bandit = base_task(spec.task)[1] == "bandit"
        mdp = self._measure("test").mdp
        self._reference = LMPolicy.for_mdp(mdp, self.task.reference)
        self.agent: Agent[Any] | None = None
        self.kl_coef: float | None = None
        self.env: TextVectorEnv | TextBanditVectorEnv | None = None
        start = LMPolicy.for_mdp(mdp, self.task.start)
        self.exact = Exact(mdp) if exact.is_table(self.task) else None
        self.policy: Any = start
        n = best_of(spec.algorithm)
        trained = n is None and spec.algorithm != "sft"
        if bandit and not trained:
            raise UserError(
                f"{spec.label}: SFT and best-of-n need no training, so they have no bandit env: leave them out"
            )
        if n is not None:
            self.policy = BestOfN(start, mdp, n)
        if trained:
            overrides = check_overrides(spec.algorithm, spec.overrides)
            if self.exact is None:
                model = adapted(self.task.start, Adaptation(**spec.adaptation), spec.seed)
                self.policy = LMPolicy.for_mdp(mdp, model, bandit=bandit, compile=spec.compile)
            else:
                if spec.adaptation or spec.compile:
                    raise UserError(f"{spec.label}: the policy is a table, with no layers to freeze, adapt or compile")
                table = self.exact.table(self.task.start)
                self.policy = TabularPolicy(self.exact, table, bandit, VALUE_SCALE)
                preset = TABULAR.get(spec.algorithm, {})
                overrides = {name: preset[name] for name in preset if name not in spec.env} | overrides
            self.agent = self._agent(self.policy, overrides)
            make = TextBanditVectorEnv if bandit else TextVectorEnv
            self.env = make(self.task, split="train", group_size=self.agent.config.group_size, **self._options)
            if not self.agent.needs_data:
                self.kl_coef = self.agent.settle_kl_coef(self.env)

    def _agent(self, policy: Any, overrides: dict[str, Any]) -> Agent[Any]:
        agent = make_agent(self.spec.algorithm, policy, self.task, **{"seed": self.spec.seed, **overrides})
        if self.exact is not None:
            agent.reference = TabularPolicy(self.exact)  # faster than the model that holds the table
        return _fit(agent, self.spec)

    def _gradient(self) -> dict[str, float]:
        """How the algorithm's direction compares with the exact gradient; nothing where it does not sample."""
        if self.agent is None or self.agent.needs_data or self.exact is None or self.exact.kl_coef == 0:
            return {}
        bandit = self.policy.bandit
        policy = TabularPolicy(self.exact, exact.half_way(self.exact), bandit, VALUE_SCALE)
        fresh = self._agent(policy, asdict(self.agent.config))
        return exact.gradient(fresh, self.exact, bandit=bandit, seed=self.spec.seed)

    def _measure(self, split: str) -> TextVectorEnv:
        if split not in self._measures:
            self._measures[split] = samples.evaluation_env(self.task, split, **self._options)
        return self._measures[split]

    def settings(self) -> dict[str, Any]:
        mdp = self._measure("test").mdp
        charged = None if self.kl_coef is None or self.env is None else self.env.mdp.kl_in_reward
        return {
            "agent": None if self.agent is None else asdict(self.agent.config),
            "env": {name: getattr(mdp, name) for name in _OPTIONS} | {"kl_coef": self.kl_coef, "kl_in_reward": charged},
            "task": {"description": self.task.description, "stats": dict(self.task.stats)},
        } | self.sizes(self.task.start)

    def try_out(self) -> None:
        """Let the reference answer two prompts of each split that is used and score them: a broken reward or judge
        shows here."""
        for split in ("train", "validation", "test"):
            samples.sample_reference(self._measure(split), self._reference, 2)

    def validate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        found = samples.sample_policy(self._measure("validation"), self.policy, self.spec.plan.validation_prompts, 0)
        metrics = {name: float(np.mean(getattr(found, name))) for name in self.tracked}
        if self.exact is not None:
            metrics |= exact.measure(self.exact, self.policy)
        return metrics, found.records(4)

    def evaluate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        env, count = self._measure("test"), self.spec.plan.test_prompts
        reference = samples.sample_reference(env, self._reference, count)
        found = samples.sample_policy(env, self.policy, count, self.spec.seed)
        measured = samples.summarise(found, reference, self.policy, self.task.stats)
        measured |= samples.measure_greedy(env.mdp, self.policy, count)
        if self.exact is not None:
            measured |= exact.result(self.exact, self.policy) | self._gradient()
        return measured | {"kl_coef": self.kl_coef}, found.records()

    def save_model(self, folder: Path) -> None:
        """The tuned model, if transformers could read it: not a table, nor a policy that wants reward tokens before its
        prompts."""
        if self.agent is not None and isinstance(self.policy, LMPolicy) and self.policy.condition is None:
            merge = bool(self.spec.adaptation.get("lora_merge", False))
            save_model(self.policy.model, self.task.tokenizer, folder, merge, self.task.eos_token_ids)

    def texts(self, traj: Trajectories, count: int = 2) -> list[str]:
        if traj.prompt is None or traj.response is None:
            return []
        mdp = self._measure("test").mdp
        rows = slice(count)
        prompts, responses = mdp.texts(traj.prompt[rows].numpy(), traj.response[rows].numpy())
        scores = traj.score[rows].tolist() if traj.score is not None else [math.nan] * len(prompts)
        return [f"{p} | {r}  ({s:.2f})" for p, r, s in zip(prompts, responses, scores, strict=True)]


_OPTIONS = ("temperature", "max_new_tokens", "min_new_tokens", "missing_eos")


class ControlProblem(Problem):
    """A Gymnasium environment with a small feed-forward policy, for checking algorithms on what everybody knows. Its
    result has the mean return of 100 test episodes as ``proxy``, and the env steps as tokens and reward calls."""

    _test_episodes = 100

    def __init__(self, spec: RunSpec) -> None:
        import gymnasium

        from lm_envs.algos.engine.settings_control import ROWS, control_settings
        from lm_envs.algos.policies.mlp import MLPPolicy

        if spec.algorithm == "sft" or best_of(spec.algorithm) is not None:
            raise UserError(
                f"{spec.label}: {spec.algorithm} is for text; on a control environment use ppo, a2c or reinforce"
            )
        if spec.adaptation:
            raise UserError(f"{spec.label}: freeze_layers and lora_rank are for language models")
        if spec.options:
            raise UserError(f"{spec.label}: a control environment takes no task options, got {', '.join(spec.options)}")
        self.spec = spec
        mode = gymnasium.vector.AutoresetMode.SAME_STEP

        def make() -> Any:
            return gymnasium.make_vec(
                spec.task, ROWS, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **spec.env
            )

        self.env, self._test_env = make(), make()
        self.policy: Any = MLPPolicy(self.env, seed=spec.seed)
        settings = control_settings(spec.task, spec.algorithm)
        overrides = {**settings, "seed": spec.seed, **check_overrides(spec.algorithm, spec.overrides)}
        self.agent: Agent[Any] = _fit(make_agent(spec.algorithm, self.policy, None, **overrides), spec)

    def settings(self) -> dict[str, Any]:
        return {
            "agent": asdict(self.agent.config),
            "env": {"rows": self.env.num_envs, **self.spec.env},
            "task": {"description": f"Gymnasium's {self.spec.task}", "stats": {}},
        } | self.sizes(self.policy)

    def _returns(self, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        from lm_envs.env.rollout import collect

        with torch.no_grad():
            traj = collect(self._test_env, self.policy, episodes=episodes, seed=seed)
        assert traj.reward is not None
        return (traj.reward * traj.mask).sum(dim=1).double().numpy(), traj.lengths.numpy()

    def validate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        returns, lengths = self._returns(20, 1 << 20)
        return {"return": float(returns.mean()), "length": float(lengths.mean())}, []

    def evaluate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        returns, lengths = self._returns(self._test_episodes, (1 << 21) + self.spec.seed)
        return {
            **dict.fromkeys(("win_rate", "win_rate_se", "gold", "kl", "distinct_2"), math.nan),
            "proxy": float(returns.mean()),
            "proxy_se": samples.standard_error(returns),
            "length": float(lengths.mean()),
            "inference_tokens": int(lengths.sum()),
            "inference_episodes": len(lengths),
            "inference_reward_calls": 0,
            "inference_s": 0.0,
        }, []
