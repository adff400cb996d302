"""Iterated RLHF: as the policy moves, annotators compare what it writes now, and the reward model is made anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_envs import counted, supervised
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.kl import text_envs
from lm_envs.observations import left_pad
from lm_envs.rewards import LearnedReward
from lm_envs.tasks import making
from lm_envs.tasks.reviews import annotate, ranking_accuracy
from lm_envs.text_mdp import TextMDP
from lm_envs.trajectories import Trajectories

_ROWS = 512  # responses per forward


@dataclass
class IteratedRLHFConfig(PPOConfig):
    """Settings of :class:`IteratedRLHF`: PPO's, the annotators' and the reward model's."""

    rounds: int = 2
    """How many times the annotators are asked and the reward model is made, evenly over `iterations`; 1 is RLHF."""
    annotations: int = 8192
    """Pairs compared in all rounds together."""
    held_out: int = 512
    """Pairs per round that measure the reward model by the judge and train nothing."""
    flip: float = 0.25
    """Probability that a simulated annotator's choice is recorded the wrong way round."""
    rm_start: Literal["fresh", "task"] = "fresh"
    """What a round's reward model starts from: random weights, or the task's reward model."""
    rm_steps: int = 192
    """Steps of training per round."""
    rm_batch: int = 128
    """Pairs per step."""
    rm_learning_rate: float = 2e-3
    """Its highest step size."""
    rm_weight_decay: float = 0.1
    """Of AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "held_out", "rm_steps", "rm_batch", "rm_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.annotations < self.rounds:
            raise ValueError(f"annotations must be at least one per round, got {self.annotations} for {self.rounds}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must lie in [0, 1], got {self.flip}")
        if self.rm_start not in ("fresh", "task"):
            raise ValueError(f"rm_start must be 'fresh' or 'task', got {self.rm_start!r}")


@dataclass
class Compared:
    """N pairs of responses; the two of a pair stand in rows 2i and 2i + 1.

    Attributes:
        samples: 2N responses, as rewards take them.
        gold: ``(N, 2)`` the judge's scores.
        tokens: how many were generated.
    """

    samples: making.Samples
    gold: NDArray[np.float64]
    tokens: int


class IteratedRLHF(PPO):
    """PPO in rounds, each on a new reward model (Bai et al. 2022, "Training a helpful and harmless assistant", section
    4.5, iterated online RLHF; Christiano et al. 2017).

    A round begins by sampling pairs from the policy as it is; simulated annotators, who follow the task's judge,
    choose; a reward model is trained on the choices of all rounds so far, normalised on the start's samples, and
    replaces the env's reward. The metrics of a round's first iteration hold ``rm_accuracy``, how often the new
    reward model orders held-out pairs of the current policy as the judge does, and ``rm_accuracy_before``, the
    same of the reward that was in use until then.

    Raises:
        ValueError: when it first iterates, on an env whose task has no judge, or no learned reward to give the
            reward model's architecture and tokenizer.
    """

    Config = IteratedRLHFConfig
    config: IteratedRLHFConfig
    name = "iterated-rlhf"

    def __init__(self, policy: Any, config: IteratedRLHFConfig | None = None) -> None:
        super().__init__(policy, config)
        self.rounds_done = 0
        self.reward: LearnedReward | None = None
        self._task_reward: LearnedReward | None = None
        self._texts: list[list[list[int]]] = []  # pairs, as the reward model reads them
        self._choices = np.zeros(0, dtype=bool)  # whether the first of each pair was preferred
        self._saved: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None

    def iteration(self, env: Any = None) -> tuple[Trajectories, dict[str, float]]:
        """As every agent's; where a round is due, with a new reward model first."""
        if env is None or not text_envs(env):
            raise ValueError("iterated-rlhf needs a text env to sample from")
        mdp = text_envs(env)[0].mdp
        if self._task_reward is None:
            self._task_reward = _learned(mdp)
            if self._saved is not None:
                self._rebuild(*self._saved)
        due = min(self.iterations_done * self.config.rounds // self.config.iterations, self.config.rounds - 1)
        metrics = self._begin_round(mdp) if due >= self.rounds_done else {}
        for inner in text_envs(env):
            inner.mdp.task = replace(inner.mdp.task, reward=self.reward)
        traj, found = super().iteration(env)
        return traj, found | metrics

    def _begin_round(self, mdp: TextMDP) -> dict[str, float]:
        config, number = self.config, self.rounds_done
        count = config.annotations // config.rounds
        first = number * (count + config.held_out)
        fresh = self._compare(mdp, first, count)
        held = self._compare(mdp, first + count, config.held_out)
        choices = annotate(fresh.gold[:, 0], fresh.gold[:, 1], flip=config.flip, seed=config.seed + number)
        template = self._task_reward
        assert template is not None
        self._texts += _pairs(template, fresh.samples)
        self._choices = np.concatenate([self._choices, choices])
        before = _accuracy(held, mdp.task.reward if self.reward is None else self.reward)
        made = LearnedReward(self._train(template, number), template.tokenizer, batch_size=template.batch_size)
        # In units of the *start's* samples in every round, or the penalty would weigh less from round to round.
        units = held.samples if self.reward is None else None
        self.reward = self._in_units(made, units)
        self.rounds_done += 1
        self.tokens_done += fresh.tokens + held.tokens
        return {
            "round": number,
            "annotations": len(self._choices),
            "rm_accuracy": _accuracy(held, self.reward),
            "rm_accuracy_before": before,
        }

    def _in_units(self, made: LearnedReward, samples: making.Samples | None) -> LearnedReward:
        if samples is not None:
            self._units = _pairs(made, samples)
        ids = [text for pair in self._units for text in pair]
        scores = []
        with torch.no_grad():
            for start in range(0, len(ids), _ROWS):
                rows = supervised.right_pad(ids[start : start + _ROWS]).to(made.model.device)
                scores.append(supervised.raw_scores(made.model, rows).double().cpu())
        found = torch.cat(scores)
        moments = (float(found.mean()), float(found.std(unbiased=False)))
        if not moments[1] > 1e-6:
            raise ValueError("iterated-rlhf: the reward model gives all samples the same score; give it more steps")
        return LearnedReward(made.model, made.tokenizer, moments, made.batch_size, "iterated_reward_model")

    def _compare(self, mdp: TextMDP, first: int, count: int) -> Compared:
        """Pairs number ``first`` and up of the current policy's responses, judged."""
        pair = np.arange(first, first + count)
        index = counted.integers(self.config.seed, counted.PROMPT, making.SAMPLE_EPISODES + pair, len(mdp.prompts))
        prompt = left_pad([mdp.prompts[i] for i in np.repeat(index, 2)], mdp.prompt_length)
        row = making.SAMPLE_EPISODES + 2 * first + np.arange(2 * count)
        places = np.arange(self.policy.uniforms_per_response)
        parts = []
        for start in range(0, 2 * count, _ROWS):
            rows = slice(start, start + _ROWS)
            uniforms = counted.uniform(self.config.seed, counted.TOKEN, row[rows, None], places)
            parts.append(self.policy.respond(torch.as_tensor(prompt[rows]), torch.as_tensor(uniforms))[0].cpu())
        response = torch.cat(parts).numpy()
        ids = [r[r >= 0].tolist() for r in response]
        samples = making.Samples(mdp.texts(prompt), mdp.texts(response), ids, mdp.finish_reasons(response))
        return Compared(samples, samples.score(mdp.task.judge).reshape(-1, 2), int((response >= 0).sum()))

    def _train(self, template: LearnedReward, number: int) -> Any:
        config = self.config
        model = _fresh(template.model, config.seed + number) if config.rm_start == "fresh" else _copy(template.model)
        supervised.fit_reward_model(
            model,
            self._texts,
            np.stack([~self._choices, self._choices], axis=1).astype(np.int64),
            steps=config.rm_steps,
            batch_size=config.rm_batch,
            learning_rate=config.rm_learning_rate,
            weight_decay=config.rm_weight_decay,
            seed=config.seed + number,
        )
        return model.requires_grad_(False)

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.reward is None:
            return self._saved if self._saved is not None else ({}, {"rounds": 0})  # type: ignore[return-value]
        tensors = {f"rm.{name}": t for name, t in self.reward.model.state_dict().items()}
        tensors["texts"] = supervised.right_pad([text for pair in self._texts for text in pair])
        tensors["units"] = supervised.right_pad([text for pair in self._units for text in pair])
        tensors["choices"] = torch.from_numpy(self._choices.astype(np.int64))
        return tensors, {"rounds": self.rounds_done, "normalise": list(self.reward.normalise)}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.rounds_done = values["rounds"]
        self.reward = self._task_reward = None
        # The reward model's architecture is the env's task's: it is built at the next iteration.
        self._saved = (dict(tensors), dict(values)) if tensors else None

    def _rebuild(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        template = self._task_reward
        assert template is not None
        model = _copy(template.model)
        model.load_state_dict({n.removeprefix("rm."): t for n, t in tensors.items() if n.startswith("rm.")})
        self._texts, self._units = _table(tensors["texts"]), _table(tensors["units"])
        self._choices = tensors["choices"].numpy().astype(bool)
        moments = tuple(values["normalise"])
        self.reward = LearnedReward(
            model.requires_grad_(False), template.tokenizer, moments, template.batch_size, "iterated_reward_model"
        )
        self._saved = None


def _learned(mdp: TextMDP) -> LearnedReward:
    if mdp.task.judge is None:
        raise ValueError(f"iterated-rlhf: task {mdp.task.name!r} has no judge for simulated annotators to follow")
    if not isinstance(mdp.task.reward, LearnedReward):
        raise ValueError(
            f"iterated-rlhf makes reward models like the task's, and that of task {mdp.task.name!r} is not one "
            "learned reward model"
        )
    return mdp.task.reward


def _pairs(reward: LearnedReward, samples: making.Samples) -> list[list[list[int]]]:
    """The texts of pairs as the reward model reads them."""
    rows = [
        reward.encode(prompt + completion, reason == "stop")
        for prompt, completion, reason in zip(samples.prompts, samples.completions, samples.finish_reasons, strict=True)
    ]
    return [rows[i : i + 2] for i in range(0, len(rows), 2)]


def _table(padded: Tensor) -> list[list[list[int]]]:
    rows = [row[row >= 0].tolist() for row in padded]
    return [rows[i : i + 2] for i in range(0, len(rows), 2)]


def _accuracy(held: Compared, reward: Any) -> float:
    scores = held.samples.score(reward).reshape(-1, 2)
    return ranking_accuracy(held.gold, scores[:, 0] - scores[:, 1])


def _copy(model: Any) -> Any:
    return copy.deepcopy(model).eval().requires_grad_(True)


def _fresh(model: Any, seed: int) -> Any:
    """The architecture with weights drawn from the seed; the caller's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(model)(model.config).to(dtype=model.dtype, device=model.device).eval()
    head = getattr(made, "score", None)
    if isinstance(head, nn.Linear):
        supervised.initialise_reward_head(head, torch.Generator().manual_seed(seed))
    return made
