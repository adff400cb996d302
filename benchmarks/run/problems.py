"""The problem of a run: a text task or a control environment, with its policy, its agent and its measurements."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch

from lm_envs.algos.best_of_n import BestOfN
from lm_envs.algos.engine import cost
from lm_envs.algos.engine import settings_by_size as rules
from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.exact_gradients import sampled_cosine
from lm_envs.algos.engine.settings_control import ROWS, control_settings
from lm_envs.algos.engine.settings_enumerable import TABULAR, VALUE_SCALE
from lm_envs.algos.few_shot import FewShot
from lm_envs.algos.policies.adaptation import Adaptation, adapted, save_model
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.policies.mlp import MLPPolicy
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import ALGORITHMS, Unsuited, make_agent, make_config
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.measure import exact, samples
from lm_envs.benchmarks.measure.attempts import measure_attempts
from lm_envs.benchmarks.run.budgets import MOST
from lm_envs.benchmarks.run.names import base_task, best_of, is_control, is_untrained, saved
from lm_envs.benchmarks.run.stop_rules import Rule, check_measured, parse_rule
from lm_envs.benchmarks.run.suites import Guards, RunSpec, check_overrides
from lm_envs.env.rollout import collect
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.model.adapters import has_adapters
from lm_envs.model.encoder_decoder import is_encoder_decoder
from lm_envs.model.loading import load_beside
from lm_envs.plugins import find
from lm_envs.reward.base import forget_parts, part_means
from lm_envs.settings import make
from lm_envs.tasks import TASKS, load, parts_of
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.enumerable import TableLM
from lm_envs.trajectories import Trajectories


def open_problem(spec: RunSpec) -> TextProblem | ControlProblem:
    """Return the problem of a run, with its task loaded; raise UserError for a stop rule on what is not measured."""
    problem = ControlProblem(spec) if is_control(spec.task) else TextProblem(spec)
    if problem.agent is not None:
        problem.stops = tuple(map(parse_rule, spec.stop))
        batches = not problem.agent.needs_data
        check_measured(problem.stops, problem.measured, batches, spec.plan.validate_every > 0, spec.label)
    return problem


def _fit(agent: Agent[Any], spec: RunSpec) -> Agent[Any]:
    """Set the iterations: those of the overrides, else of the plan, else as many as the plan's episodes need, else the
    algorithm's own. An iteration has no more episodes than the plan, in whole groups. Where another budget ends the run
    there is no limit; a method that learns from given data spends no tokens or reward calls and keeps its own."""
    config, most = agent.config, spec.plan.episodes
    if "iterations" in spec.overrides:
        return agent
    if spec.plan.iterations is not None:
        config = replace(config, iterations=spec.plan.iterations)
    elif most is not None:
        if config.steps is not None or config.episodes is None:
            raise UserError(f"{spec.label}: this algorithm samples steps, not whole episodes: set [budget] iterations")
        if config.episodes > most:
            config = replace(config, episodes=config.group_size * math.ceil(most / config.group_size))
        config = replace(config, iterations=math.ceil(most / config.episodes))
    elif spec.plan.spending is not None:
        kind = spec.plan.spending[0]
        if kind == "reward_calls" and not agent.policy.sequence_obs:
            raise UserError(f"{spec.label}: a control environment has no reward calls: set [budget] tokens (its steps)")
        if kind in ("flops", "seconds") or not agent.needs_data:
            config = replace(config, iterations=MOST)
    agent.config = config
    return agent


def _check_versions(name: str) -> None:
    """Raise UserError unless a task's loader can make other models."""
    if "task_seed" not in inspect.signature(find(parts_of(name)[0], "task", TASKS)).parameters:
        raise UserError(f"task {name!r} has one version of its models: its loader takes no task_seed (reviews' does)")


def chosen_by_size(spec: RunSpec, start: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the part of the model to train and the settings that rules choose for its size, where the spec leaves them
    open; warn of a given learning rate that is ten times off."""
    parameters = sum(p.numel() for p in start.parameters())
    plain = not (has_adapters(start) or is_encoder_decoder(start))
    part = rules.adaptation(parameters, spec.adaptation, plain and find_spec("peft") is not None)
    lora = has_adapters(start) or bool((part or spec.adaptation).get("lora_rank"))
    given = {**spec.overrides, **{name: value for name, value in spec.env.items() if name == "kl_coef"}}
    config = make_config(spec.algorithm, **check_overrides(spec.algorithm, spec.overrides))
    if "learning_rate" in given and (why := rules.far_off(spec.algorithm, config.learning_rate, parameters, lora)):
        warnings.warn(f"{spec.algorithm}: {why}", stacklevel=2)
    return part, rules.settings(spec.algorithm, config, parameters, lora, given)


class Problem(Protocol):
    """The work of a run; the defaults are for one that samples nothing and saves no language model.

    Attributes:
        agent: trains the policy; None for what trains nothing.
        env: the agent's environment, None if it needs none.
        policy: the policy to measure.
        given: the cost of data that were there before the run: comparisons given, and those behind the reward.
    """

    agent: Any
    policy: Any
    env: Any = None
    given: Counter[str] = Counter()
    guards: Guards | None = None
    """Against a collapse of the policy; None where it cannot be told."""
    stops: tuple[Rule, ...] = ()
    """Rules that end training before its budget."""

    def settings(self) -> dict[str, Any]:
        """Return what ``config.json`` says beyond the spec."""

    def validate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Measure a point of the learning curve, the same way each time; return it and some samples."""

    def evaluate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Measure the result; return it and the samples that it is the mean of."""

    def save_model(self, folder: Path) -> None:
        """Save the tuned model and the tokenizer for transformers' ``from_pretrained``."""
        return None

    def texts(self, traj: Trajectories, count: int = 2) -> list[str]:
        """Return the first texts of a training batch, with their scores."""
        return []

    def samples(self, traj: Trajectories, count: int = 3) -> list[dict[str, Any]]:
        """Return some texts that the policy sampled in a training batch: ``prompt``, ``response`` and ``score``."""
        return []

    def costs(self, measured: dict[str, Any]) -> dict[str, int]:
        """Return the cost of training and measuring."""
        return cost.total(self.agent, self.given, measured)

    def sizes(self, model: Any, trained: Any = None) -> dict[str, int]:
        """Count the parameters of a model, and those of ``trained`` (the policy with its heads) that are trained."""
        module = trained or (None if self.agent is None else self.policy)
        count = 0 if module is None else sum(p.numel() for p in module.parameters() if p.requires_grad)
        return {"parameters": sum(p.numel() for p in model.parameters()), "trainable_parameters": count}


class TextProblem(Problem):
    """A text task as an MDP or as a bandit env.

    Attributes:
        kl_coef: the KL coefficient that training starts with, None where training samples nothing.
        exact: the solution of a task that is solved exactly: then the policy is a table, with settings of its own, and
            measurements are expectations.
    """

    tracked = ("gold", "proxy", "kl", "length")

    @property
    def given(self) -> Counter[str]:  # type: ignore[override]
        agent = self.agent
        found = Counter() if agent is None else Counter(agent.given)
        annotators = agent is not None and agent.preference_data and self.task.judge is None  # they followed the reward
        uses_reward = best_of(self.spec.algorithm) is not None if agent is None else agent.uses_reward or annotators
        return found + cost.of_reward(self.task) if uses_reward else found

    def __init__(self, spec: RunSpec, task: TextTask | None = None) -> None:
        """Open the problem, with another task than the spec's where one is given."""
        options = dict(spec.options)
        name, env = base_task(spec.task)
        bandit = env == "bandit"
        if name == "custom":  # its loader checks lengths and samples to standardize scores
            names = ("max_new_tokens", "min_new_tokens", "temperature")
            options |= {name: spec.env[name] for name in names if name in spec.env}
        if spec.task_seed:
            _check_versions(name)
            options["task_seed"] = spec.task_seed
        self.spec, self.task = spec, task or load(name, **options)
        # TOML and JSON have no tuples
        self._options: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in spec.env.items()}
        self._measures: dict[str, TextVectorEnv] = {}
        self._validation_sft: np.ndarray | None = None  # its gold per validation prompt
        mdp = self._measure("test").mdp
        self._reference = LMPolicy.for_mdp(mdp, self.task.reference)
        self.agent: Agent[Any] | None = None
        self.kl_coef: float | None = None
        self.chosen: dict[str, Any] = {}  # by the rules of settings_by_size
        self.env: TextVectorEnv | TextBanditVectorEnv | None = None
        start = LMPolicy.for_mdp(mdp, self.task.start)
        self.exact = Exact(mdp) if isinstance(self.task.start, TableLM) else None
        guards = make(Guards, spec.guards, "guards")
        size = sum(p.numel() for p in self.task.start.parameters())
        # A policy that is a table has short responses, and its distance to the optimum says all.
        if self.exact is None and guards.acts(size) != "off":
            self.guards = replace(guards, action=guards.acts(size))
        self.policy: Any = start
        n = best_of(spec.algorithm)
        if n is not None:
            temperature = mdp.kl_coef if spec.algorithm.startswith("soft-") else None
            self.policy = BestOfN(start, mdp, n, temperature)
        elif spec.algorithm == "prompted":
            if not self.task.examples:
                raise Unsuited(f"{spec.task}: prompted needs examples to show, which the task does not have")
            self.policy = FewShot(start, self._measure(spec.plan.split).mdp)
        elif (place := saved(spec.algorithm)) is not None:
            self.policy = LMPolicy.for_mdp(mdp, load_beside(place, self.task.reference, self.task.tokenizer))
        if is_untrained(spec.algorithm):
            if bandit:
                why = "needs no training, so it has no bandit env: leave it out"
                raise Unsuited(f"{spec.task}: {spec.algorithm} {why}")
        else:
            overrides = check_overrides(spec.algorithm, spec.overrides)
            if self.exact is None:
                part, rules = chosen_by_size(spec, self.task.start)
                self.chosen, overrides = part | rules, rules | overrides
                model = adapted(self.task.start, Adaptation(**{**spec.adaptation, **part}), spec.seed)
                self.policy = LMPolicy.for_mdp(mdp, model, bandit=bandit, compile=spec.compile)
            else:
                if spec.adaptation or spec.compile:
                    raise UserError(f"{spec.label}: the policy is a table, with no layers to freeze, adapt or compile")
                table = self.exact.table(self.task.start)
                self.policy = TabularPolicy(self.exact, table, bandit=bandit, value_scale=VALUE_SCALE)
                preset = TABULAR.get(spec.algorithm, {})
                overrides = {name: preset[name] for name in preset if name not in spec.env} | overrides
            self.agent = self._agent(self.policy, overrides)
            kind = TextBanditVectorEnv if bandit else TextVectorEnv
            self.env = kind(self.task, split="train", group_size=self.agent.config.group_size, **self._options)
            if not self.agent.needs_data:
                self.kl_coef = self.agent.settle_kl_coef(self.env)

    def _agent(self, policy: Any, overrides: dict[str, Any]) -> Agent[Any]:
        agent = make_agent(self.spec.algorithm, policy, self.task, **{"seed": self.spec.seed, **overrides})
        if self.exact is not None:
            agent.reference = TabularPolicy(self.exact)  # faster than the model that holds the table
        return _fit(agent, self.spec)

    def _gradient(self) -> dict[str, float]:
        """Compare the algorithm's direction with the exact gradient, if it samples."""
        if self.agent is None or self.agent.needs_data or self.exact is None or self.exact.kl_coef == 0:
            return {}
        bandit = self.policy.bandit
        policy = TabularPolicy(self.exact, exact.half_way(self.exact), bandit=bandit, value_scale=VALUE_SCALE)
        fresh = self._agent(policy, asdict(self.agent.config))
        fresh.settle_kl_coef(self.env)  # some take the env's MDP there
        cosine, error = sampled_cosine(fresh, self.exact, bandit=bandit, seed=self.spec.seed)
        return {"gradient_cosine": cosine, "gradient_cosine_se": error}

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
            "task": {"description": self.task.description, "stats": dict(self.task.stats)}
            | ({"sensitive": True} if self.task.sensitive else {}),
            **({"chosen_by_rule": self.chosen} if self.chosen else {}),
            **({"guards": asdict(self.guards)} if self.guards and self.agent else {}),
        } | self.sizes(self.task.start)

    def try_out(self) -> None:
        """Score two samples of the reference in each split, so that a broken reward or judge shows here."""
        for split in ("train", "validation", "test"):
            samples.sample_reference(self._measure(split), self._reference, 2)

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics of :meth:`validate` that a stop rule may be about."""
        if self.exact is not None:
            return (*self.tracked, "win_rate", "regret", "frontier_gap")
        judged = self.task.judge is not None
        return tuple(name for name in (*self.tracked, "win_rate") if judged or name not in ("gold", "win_rate"))

    def validate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        env, count = self._measure("validation"), self.spec.plan.validation_prompts
        found = samples.sample_policy(env, self.policy, count, 0)
        metrics: dict[str, Any] = {name: float(np.mean(getattr(found, name))) for name in self.tracked}
        if self.exact is not None:
            metrics |= exact.measure(self.exact, self.policy)
        elif self.task.judge is not None:
            if self._validation_sft is None:
                self._validation_sft = samples.sample_reference(env, self._reference, count).gold
            wins = samples.wins(found.gold, self._validation_sft)
            metrics |= {"win_rate": float(wins.mean()), "golds": found.gold.round(6).tolist(), "wins": wins.tolist()}
        return metrics, found.records(4)

    def evaluate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        env, count = self._measure(self.spec.plan.split), self.spec.plan.test_prompts
        reference = _reference_samples(env, self._reference, count, self._options)
        forget_parts(self.task.reward)
        found = samples.sample_policy(env, self.policy, count, self.spec.seed)
        parts = {} if isinstance(self.policy, BestOfN) else part_means(self.task.reward)  # that scores n of each
        measured = parts | samples.summarise(found, reference, self.policy, self.task.stats)
        measured |= samples.simulated(env.mdp, found, reference)
        measured |= samples.measure_greedy(env.mdp, self.policy, count)
        measured |= measure_attempts(self.task, self.policy, self.spec.plan.split, count, self.spec.seed, self._options)
        if self.exact is not None:
            measured |= exact.result(self.exact, self.policy) | self._gradient()
        return measured | {"kl_coef": self.kl_coef}, found.records()

    def save_model(self, folder: Path) -> None:
        """Save the tuned model if transformers can read it: no table, no policy with reward tokens before prompts."""
        if self.agent is not None and isinstance(self.policy, LMPolicy) and self.policy.condition is None:
            merge = bool(self.spec.adaptation.get("lora_merge", False))
            save_model(self.policy.model, self.task.tokenizer, folder, merge, self.task.eos_token_ids)

    def texts(self, traj: Trajectories, count: int = 2) -> list[str]:
        return [f"{prompt} | {response}  ({score:.2f})" for prompt, response, score in self._texts(traj, slice(count))]

    def samples(self, traj: Trajectories, count: int = 3) -> list[dict[str, Any]]:
        if self.agent is None or self.agent.needs_data:
            return []
        rows = np.linspace(0, len(traj), count, endpoint=False, dtype=int)  # of a few prompts, not of one group
        found = self._texts(traj, np.unique(rows))
        return [dict(zip(("prompt", "response", "score"), each, strict=True)) for each in found]

    def _texts(self, traj: Trajectories, rows: Any) -> list[tuple[str, str, float]]:
        if traj.prompt is None or traj.response is None or not len(traj):
            return []
        mdp = self._measure("test").mdp
        prompts, responses = mdp.texts(traj.prompt[rows].numpy(), traj.response[rows].numpy())
        scores = traj.score[rows].tolist() if traj.score is not None else [math.nan] * len(prompts)
        return list(zip(prompts, responses, scores, strict=True))


_reference_samples = samples.ReferenceSamples()
_OPTIONS = ("temperature", "max_new_tokens", "min_new_tokens", "missing_eos")


class ControlProblem(Problem):
    """A Gymnasium environment with a small feed-forward policy, to check algorithms on well-known problems. Its result
    has the mean return of 100 test episodes as ``proxy``, and the env steps as tokens and reward calls."""

    measured = ("return", "length")

    def __init__(self, spec: RunSpec) -> None:
        ours = spec.algorithm in ALGORITHMS or best_of(spec.algorithm) is not None
        if ours and not control_settings(spec.task, spec.algorithm):
            why = "is for text; on a control environment use ppo, a2c or reinforce"
            raise Unsuited(f"{spec.task}: {spec.algorithm} {why}")
        if spec.adaptation:
            raise UserError(f"{spec.label}: freeze_layers and lora_rank are for language models")
        if spec.options:
            raise UserError(f"{spec.label}: a control environment takes no task options, got {', '.join(spec.options)}")
        self.spec = spec
        mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
        options = {"vectorization_mode": "sync", "vector_kwargs": mode, **spec.env}
        self.env, self._test_env = (gymnasium.make_vec(spec.task, ROWS, **options) for _ in range(2))
        self.policy: Any = MLPPolicy(self.env, seed=spec.seed)
        overrides = control_settings(spec.task, spec.algorithm) | {"seed": spec.seed}
        overrides |= check_overrides(spec.algorithm, spec.overrides)
        self.agent: Agent[Any] = _fit(make_agent(spec.algorithm, self.policy, None, **overrides), spec)

    def settings(self) -> dict[str, Any]:
        return {
            "agent": asdict(self.agent.config),
            "env": {"rows": self.env.num_envs, **self.spec.env},
            "task": {"description": f"Gymnasium's {self.spec.task}", "stats": {}},
        } | self.sizes(self.policy)

    def _returns(self, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            traj = collect(self._test_env, self.policy, episodes=episodes, seed=seed)
        assert traj.reward is not None
        return (traj.reward * traj.mask).sum(dim=1).double().numpy(), traj.lengths.numpy()

    def validate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        returns, lengths = self._returns(20, 1 << 20)
        return {"return": float(returns.mean()), "length": float(lengths.mean())}, []

    def evaluate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        returns, lengths = self._returns(100, (1 << 21) + self.spec.seed)
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
