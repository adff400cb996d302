"""The library's contract tests for an algorithm, a task or a reward that is plugged in (docs/laws.md)."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from lm_envs import plugins
from lm_envs.algos.engine.agent import Agent, learn
from lm_envs.algos.engine.batching import rewards
from lm_envs.algos.engine.exact_gradients import first_gradient, sampled_cosine
from lm_envs.algos.ops.advantages import masked
from lm_envs.algos.policies.adaptation import adapted
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import ALGORITHMS, Unsuited, load, make_agent, make_config
from lm_envs.benchmarks.errors import explain
from lm_envs.benchmarks.measure.exact import half_way
from lm_envs.benchmarks.run.one_run import execute
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.env.mdp import TextMDP
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.reward.base import call_reward
from lm_envs.reward.building import build_reward
from lm_envs.reward.specs import is_spec, parse_reward
from lm_envs.reward.units import Samples
from lm_envs.tasks import TASKS, enumerable
from lm_envs.tasks import load as load_task
from lm_envs.trajectories import Trajectories

Checks = Iterator[tuple[str, Callable[[], str]]]
_ROWS, _ITERATIONS = 32, 3


class Failed(Exception):
    """A contract is broken; the message says how."""


def kind_of(text: str) -> str:
    """Return whether a text names an "algorithm", a "task" or a "reward"; ValueError if it names nothing."""
    for what, known in (("algorithm", ALGORITHMS), ("task", TASKS), ("reward", {})):
        if text in known or text in plugins.installed(what):
            return what
    if plugins.TEXT.fullmatch(text) is None and is_spec(text):
        return "reward"
    found = plugins.find(text, "plug-in")
    if isinstance(found, type):
        return "algorithm" if issubclass(found, Agent) else "reward"
    return "reward" if {"prompts", "completions", "completion_ids"} & {*inspect.signature(found).parameters} else "task"


def run(text: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Carry out the checks of what a text names; yield each one's name, "pass", "skip" or "FAIL", and why.

    Args:
        settings: those of the algorithm, the options of the task's loader, or columns that a reward receives.
    """
    what = kind_of(text)
    kinds: dict[str, Any] = {"algorithm": _Algorithm, "task": _Task, "reward": _Reward}
    for name, check in kinds[what](text, settings).checks():
        try:
            yield name, "pass", check()
        except Unsuited as error:
            yield name, "skip", str(error)
        except Failed as error:
            yield name, "FAIL", str(error)
        except Exception as error:  # noqa: BLE001, from the user's code
            yield name, "FAIL", explain(error) or plugins.told(error)


def _weights(agent: Agent[Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in agent.policy.state_dict().items()}


def _same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def _trained(task: str, algorithm: str, **settings: Any) -> str:
    """Carry out a short run as a comparison would, with its files and its evaluation."""
    disable_progress_bar()
    plan = Plan(_ITERATIONS, test_prompts=8, validation_prompts=8)
    with TemporaryDirectory() as folder:
        result = execute(RunSpec(task, algorithm, 0, plan, **settings), Path(folder))
    if result["kl"] == 0:
        raise Failed(f"{_ITERATIONS} iterations changed nothing: the policy is still the reference")
    return f"{_ITERATIONS} iterations on {task}: proxy {result['proxy']:.3g}, KL {result['kl']:.3g}"


class _Algorithm:
    """On a task with 121 responses per prompt, which is solved exactly, and a table as the policy, in float64."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name, self.settings, self.kind = name, dict(settings), load(name)
        group = make_config(name, **settings).group_size
        size = {"episodes": group * max(2, _ROWS // group), "steps": None, "epochs": 1, "minibatches": 1}
        self.small = {**size, "iterations": 4, **settings}
        task = enumerable.load(tokens=3, horizon=4)
        self.exact = Exact(TextMDP(task))
        possible: Any = self.exact.trajectories(self.exact.log_ref)[0].obs
        self.task = replace(task, demonstrations=[[i for i in row if i >= 0] for row in possible[::7].tolist()])

    def checks(self) -> Checks:
        yield "law 1: NaN in masked places changes nothing", self.masks
        yield "law 7: the ratio is 1 before the first step", self.ratio
        yield "law 8: micro-batches do not change the gradient", self.micro_batches
        yield "law 10: a run that is resumed ends as one that was not", self.resume
        yield "gradient: it points where the exact one does", self.direction
        yield "training: three iterations of a run on Reviews", self.training

    def agent(self, critic: bool = True, **changes: Any) -> Agent[Any]:
        policy = TabularPolicy(self.exact, half_way(self.exact))
        if critic:  # one at zero would hide mistakes in what is done with it
            with torch.no_grad():
                policy.value.normal_(generator=torch.Generator().manual_seed(0))
        agent = make_agent(self.name, policy, self.task, **{**self.small, **changes})
        agent.reference = TabularPolicy(self.exact)
        if not agent.needs_data:
            agent.settle_kl_coef(self.env())
        match agent.extra_state():
            case (dict(), dict()):
                return agent
        raise Failed(
            "extra_state returns two dictionaries, one of tensors and one of values in JSON's types, as in "
            'return {}, {"mean": self.mean}; restore_extra(tensors, values) takes them back (docs/plug_in.md)'
        )

    def env(self) -> TextVectorEnv:
        return TextVectorEnv(self.task, 8, group_size=make_config(self.name, **self.settings).group_size)

    def batch(self) -> Trajectories:
        agent = self.agent()
        if agent.needs_data:
            return next(agent.batches() or iter(()))
        return rollout(self.env(), agent.policy, episodes=self.small["episodes"])

    def masks(self) -> str:
        clean, dirty = self.batch(), self.batch()
        hidden = int((~dirty.mask).sum())
        for name in ("logprob", "reward", "ref_logprob"):
            if (value := getattr(dirty, name)) is not None:
                setattr(dirty, name, torch.where(dirty.mask, value, math.nan))
        one, other = self.agent(), self.agent()
        before, after = one.update(clean), other.update(dirty)
        if spoiled := [name for name in before if math.isnan(after[name]) and not math.isnan(before[name])]:
            raise Failed(f"the metric {spoiled[0]!r} becomes NaN: leave masked places out with torch.where, not by * 0")
        if not _same(_weights(one), _weights(other)):
            raise Failed("the weights come out differently: something reads what lies behind the end of a response")
        return f"{hidden} masked places"

    def ratio(self) -> str:
        if self.kind.needs_data:
            raise Unsuited(f"{self.name} does not sample")
        metrics = self.agent().iteration(self.env())[1]
        if (gap := metrics.get("logprob_gap_max", 0.0)) > 1e-9:
            raise Failed(f"log-probabilities differ from those that were sampled with, by up to {gap:.2g} nats")
        ratios = {name: value for name, value in metrics.items() if name.startswith("ratio")}
        if wrong := [name for name, value in ratios.items() if abs(value - 1) > 1e-9]:
            raise Failed(f"the metric {wrong[0]!r} is {ratios[wrong[0]]:.6g}: divide by before.logprob, in prepare")
        return "" if ratios else "its loss reports no metric 'ratio'; the log-probabilities agree"

    def micro_batches(self) -> str:
        traj = self.batch()
        changes: dict[str, Any] = {"max_grad_norm": 1e9, "epochs": 1, "minibatches": 1}
        whole, parts = (first_gradient(self.agent(micro_batch=size, **changes), traj) for size in (len(traj), 3))
        largest = max(float(gradient.abs().max()) for gradient in whole.values())
        if largest == 0:
            raise Failed("the loss has no gradient")
        worst = max(float((whole[name] - parts[name]).abs().max()) for name in whole) / largest
        if not worst < 1e-9:
            raise Failed(
                f"three rows at a time change it by {worst:.2%}: the loss must be a mean over each {self.kind.unit!r} "
                "(the class's unit) of the rows it gets, and what needs the whole batch belongs in prepare"
            )
        return f"a mean over each {self.kind.unit}"

    def resume(self) -> str:
        def end(killed: bool) -> dict[str, torch.Tensor]:
            torch.manual_seed(0)
            agent, env = self.agent(), self.env()
            learn(agent, env, 2)
            if killed:
                (tensors, values), state = agent.checkpoint(), torch.get_rng_state()
                agent, env = self.agent(), self.env()
                agent.restore(tensors, json.loads(json.dumps(values)))
                torch.set_rng_state(state)
            return _weights(learn(agent, env, 2))

        with torch.random.fork_rng(devices=[]):
            first, again, resumed = end(False), end(False), end(True)
        if not _same(first, again):
            raise Failed(
                "two runs with the same seed differ: take random numbers from torch's generator, or count them"
            )
        if not _same(first, resumed):
            raise Failed("it forgets something: return it from extra_state, and take it back in restore_extra")
        return "bit for bit"

    def direction(self) -> str:
        if self.kind.needs_data:
            raise Unsuited(f"{self.name} does not sample")
        agent = self.agent(critic=False)
        if agent.mixture(0) is not None:
            raise Unsuited("demonstrations, which it learns from too, have a direction of their own")
        found, error = sampled_cosine(agent, self.exact, episodes=2**12)
        if not found > 0.5:
            raise Failed(f"cosine {found:.3f} ± {error:.3f}: the step does not raise the return; check the signs")
        return f"cosine {found:.3f} ± {error:.3f} (1 without bias; GRPO 0.80, expert iteration 0.69)"

    def training(self) -> str:
        return _trained("reviews", self.name, overrides={"episodes": self.small["episodes"], **self.settings})


def _scored_alike(reward: Any, samples: Samples) -> str:
    """Compare the scores of a batch with those of another call, of the reverse order, and of each sample alone."""
    rows = list(range(len(samples.prompts)))

    def score(chosen: list[int]) -> np.ndarray[Any, Any]:
        given = {name: [values[i] for i in chosen] for name, values in samples.given.items()}
        found = call_reward(reward, **given)
        return found.sum(axis=1) if found.ndim == 2 else found

    whole = score(rows)
    others = {
        "called again": score(rows),
        "in another order": score(rows[::-1])[::-1],
        "scored alone": np.concatenate([score([i]) for i in rows]),
    }
    for how, found in others.items():
        if not np.allclose(found, whole, rtol=1e-4, atol=1e-5):
            i = int(np.abs(found - whole).argmax())
            raise Failed(f"sample {i} ({samples.completions[i]!r}) scores {whole[i]:.6g}, and {found[i]:.6g} {how}")
    return f"{len(rows)} samples score {whole.min():.3g} to {whole.max():.3g}"


class _Reward:
    """On responses of Reviews' reference."""

    def __init__(self, text: str, columns: Mapping[str, Any]) -> None:
        self.reward = build_reward(parse_reward(text))
        reviews = load_task("reviews")
        held = {split: {n: [v] * len(rows) for n, v in columns.items()} for split, rows in reviews.prompts.items()}
        self.task = replace(reviews, reward=self.reward, columns=held if columns else {})
        env = TextVectorEnv(replace(reviews, columns=self.task.columns))
        self.policy = LMPolicy.for_mdp(env.mdp, reviews.reference)
        traj = rollout(env, self.policy, episodes=16)
        assert traj.prompt_index is not None and traj.response is not None
        self.samples = env.mdp.samples(traj.prompt_index.numpy(), traj.response.numpy())

    def checks(self) -> Checks:
        yield "scores: the same whenever, in any order and alone", lambda: _scored_alike(self.reward, self.samples)
        yield "an empty response has a score", self.empty
        yield "training: three iterations of REINFORCE on Reviews", self.training

    def empty(self) -> str:
        given = {name: values[:1] for name, values in self.samples.given.items()}
        return f"{float(call_reward(self.reward, **{**given, 'completions': [''], 'completion_ids': [[0]]}).sum()):.3g}"

    def training(self) -> str:
        env = TextVectorEnv(self.task, 8, group_size=make_config("reinforce").group_size)
        policy = LMPolicy.for_mdp(env.mdp, adapted(self.task.start))
        agent = make_agent("reinforce", policy, self.task, episodes=_ROWS, iterations=_ITERATIONS)
        returns: list[float] = []
        learn(agent, env, callback=lambda agent, traj, metrics: returns.append(metrics["score"]))
        return f"mean scores {', '.join(f'{value:.3g}' for value in returns)}"


class _Task:
    """On the task itself."""

    def __init__(self, text: str, options: Mapping[str, Any]) -> None:
        self.text, self.options = text, dict(options)
        self.task = load_task(text, **options)

    def checks(self) -> Checks:
        yield "loading it again gives the same", self.again
        yield "splits: prompts to train, validate and test on", self.splits
        yield "law 2: step path and bulk path agree, and so do MDP and bandit", self.paths
        for name, reward in (("reward", self.task.reward), ("judge", self.task.judge)):
            if reward is not None:
                yield f"{name}: the same scores whenever, in any order and alone", partial(self.scores, reward)
        yield "training: three iterations of a run", self.training

    def again(self) -> str:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            other = plugins.find(self.text, "task", TASKS)(**self.options)
        if other.prompts != self.task.prompts:
            raise Failed("other prompts: worker processes and resumed runs load it again and must get the same ones")
        if not _same(self.task.start.state_dict(), other.start.state_dict()):
            raise Failed("other weights: worker processes and resumed runs load it again; save the model, or seed it")
        return "prompts and weights"

    def splits(self) -> str:
        prompts = self.task.prompts
        if missing := [split for split in ("train", "validation", "test") if not prompts.get(split)]:
            raise Failed(f"no prompts in {', '.join(missing)}: a comparison needs all three")
        known = set(map(tuple, prompts["train"]))
        shared = sum(tuple(prompt) in known for prompt in prompts["test"])
        sizes = ", ".join(f"{len(rows)} {split}" for split, rows in prompts.items())
        return sizes + (f"; {shared} of the test prompts are also trained on" if shared else "")

    def paths(self) -> str:
        envs = [TextVectorEnv(self.task, 4), TextBanditVectorEnv(self.task, 4)]
        policies = [LMPolicy.for_mdp(env.mdp, self.task.start, bandit=env.is_bandit) for env in envs]
        made = [(how, env, policy) for env, policy in zip(envs, policies, strict=True) for how in (rollout, collect)]
        bulk, *others = (how(env, policy, episodes=8) for how, env, policy in made)
        for traj, name in zip(others, ("stepping the env", "the bandit env", "stepping the bandit env"), strict=True):
            returns, expected = (masked(rewards(t), t.mask).sum(dim=1) for t in (traj, bulk))
            if not torch.allclose(returns, expected, rtol=1e-3, atol=1e-3):
                i = int((returns - expected).abs().argmax())
                raise Failed(f"episode {i} returns {expected[i]:.6g} in bulk and {returns[i]:.6g} by {name}")
        return "8 episodes"

    def scores(self, reward: Any) -> str:
        env = TextVectorEnv(self.task)
        traj = rollout(env, LMPolicy.for_mdp(env.mdp, self.task.reference), episodes=8)
        assert traj.prompt_index is not None and traj.response is not None
        return _scored_alike(reward, env.mdp.samples(traj.prompt_index.numpy(), traj.response.numpy()))

    def training(self) -> str:
        return _trained(self.text, "reinforce", options=self.options, overrides={"episodes": _ROWS})
