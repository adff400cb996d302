"""Iterated RLHF: rounds of annotating the current policy's samples, retraining the reward model, and PPO."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lm_envs.algos.engine.judged_pairs import judge_pairs, make_reward_model
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.env.mdp import TextMDP
from lm_envs.env.report import text_envs
from lm_envs.model.tokens import right_pad
from lm_envs.reward.learned import LearnedReward
from lm_envs.settings import Count, NonNegative, Probability, Rate, Size
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.reviews import annotate
from lm_envs.trajectories import Trajectories

_NAME = "iterated_reward_model"


@dataclass
class IteratedRLHFConfig(PPOConfig):
    """Settings of :class:`IteratedRLHF`: PPO's, the annotators' and the reward model's."""

    rounds: Count = 2
    """Rounds of annotation and reward-model training, evenly spaced over `iterations`; 1 is plain RLHF."""
    annotations: Count = 8192
    """Pairs compared in all rounds together."""
    held_out: Count = 512
    """Held-out pairs per round that compare the reward model with the judge."""
    flip: Probability = 0.25
    """Probability that a simulated annotator's choice is flipped."""
    rm_start: Literal["fresh", "task"] = "fresh"
    """What a round's reward model starts from: random weights, or the task's reward model."""
    rm_steps: Count = 192
    """Training steps of the reward model per round."""
    rm_batch: Size = 128
    """Pairs per training step of the reward model."""
    rm_learning_rate: Rate = 2e-3
    """Peak learning rate of the reward model."""
    rm_weight_decay: NonNegative = 0.1
    """AdamW's weight decay for the reward model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.annotations < self.rounds:
            raise ValueError(f"annotations must be at least one per round, got {self.annotations} for {self.rounds}")


class IteratedRLHF(PPO):
    """PPO in rounds, each on a new reward model (Bai et al. 2022, "Training a helpful and harmless assistant", section
    4.5, iterated online RLHF; Christiano et al. 2017).

    Each round samples pairs from the current policy, and simulated annotators, which follow the task's judge, choose.
    A reward model is trained on the choices of all rounds so far, normalized on the start's samples, and replaces the
    env's reward. The metrics of a round's first iteration include ``rm_accuracy``, the share of the current policy's
    held-out pairs that the new reward model orders as the judge does, and ``rm_accuracy_before``, the same for the
    previous reward.

    Raises:
        ValueError: at the first iteration, if the env's task has no judge, or no learned reward that determines the
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
        self._units: list[list[list[int]]] = []  # the start's samples, which define the units of scores
        self._choices = np.zeros(0, dtype=bool)  # whether the first of each pair was preferred
        self._saved: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None

    @classmethod
    def lacks(cls, task: TextTask, config: Any) -> str | None:
        if task.judge is None:
            return "a judge for simulated annotators to follow"
        if not isinstance(task.reward, LearnedReward):
            return "one learned reward model to make its own like"
        if not task.reward.is_plain:
            return "a reward model of plain text, without a label, an output or a template of its own"
        return None

    def iteration(self, env: Any = None) -> tuple[Trajectories, dict[str, float]]:
        if env is None or not text_envs(env):
            raise ValueError("iterated-rlhf needs a text env to sample from")
        mdp = text_envs(env)[0].mdp
        if self._task_reward is None:
            if missing := self.lacks(mdp.task, self.config):
                raise ValueError(f"iterated-rlhf needs {missing}, which task {mdp.task.name!r} does not have")
            assert isinstance(mdp.task.reward, LearnedReward)
            self._task_reward = mdp.task.reward
            if self._saved is not None:
                self._rebuild(*self._saved)
        due = min(self.iterations_done * self.config.rounds // self.config.iterations, self.config.rounds - 1)
        metrics = self._begin_round(mdp) if due >= self.rounds_done else {}
        assert self.reward is not None  # the first round made it
        for inner in text_envs(env):
            inner.mdp.task = replace(inner.mdp.task, reward=self.reward)
        traj, found = super().iteration(env)
        return traj, found | metrics

    def _begin_round(self, mdp: TextMDP) -> dict[str, float]:
        config, number = self.config, self.rounds_done
        count = config.annotations // config.rounds
        first = number * (count + config.held_out)
        fresh = judge_pairs(mdp, self.policy, first, count, config.seed)
        held = judge_pairs(mdp, self.policy, first + count, config.held_out, config.seed)
        choices = annotate(fresh.gold[:, 0], fresh.gold[:, 1], flip=config.flip, seed=config.seed + number)
        template = self._task_reward
        assert template is not None
        self._texts += fresh.read_by(template)
        self._choices = np.concatenate([self._choices, choices])
        before = held.accuracy(mdp.task.reward if self.reward is None else self.reward)
        # The units are the *start's* samples in every round, or the penalty would weigh less from round to round.
        if self.reward is None:
            self._units = held.read_by(template)
        self.reward = make_reward_model(
            template,
            self._texts,
            self._choices,
            self._units,
            _NAME,
            start=config.rm_start,
            steps=config.rm_steps,
            batch_size=config.rm_batch,
            learning_rate=config.rm_learning_rate,
            weight_decay=config.rm_weight_decay,
            seed=config.seed + number,
        )
        self.rounds_done += 1
        self.tokens_done += fresh.tokens + held.tokens
        self.samples_done += 2 * (count + config.held_out)
        self.comparisons_done += count
        measured = {"rm_accuracy": held.accuracy(self.reward), "rm_accuracy_before": before}
        return {"round": number, "annotations": len(self._choices), **measured}

    @property
    def uses_reward(self) -> bool:
        """Whether its own reward models, or its critic, start from the env's."""
        return self.config.rm_start == "task" or self.config.value_from == "reward_model"

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.reward is None:
            return self._saved if self._saved is not None else ({}, {"rounds": 0})  # type: ignore[return-value]
        tensors = {f"rm.{name}": t for name, t in self.reward.model.state_dict().items()}
        tensors["texts"] = right_pad([text for pair in self._texts for text in pair])
        tensors["units"] = right_pad([text for pair in self._units for text in pair])
        tensors["choices"] = torch.from_numpy(self._choices.astype(np.int64))
        return tensors, {"rounds": self.rounds_done, "normalise": list(self.reward.normalise)}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.rounds_done = values["rounds"]
        self.reward = self._task_reward = None
        # Built at the next iteration, because the env's task determines the architecture.
        self._saved = (dict(tensors), dict(values)) if tensors else None

    def _rebuild(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        template = self._task_reward
        assert template is not None
        model = copy.deepcopy(template.model)
        model.load_state_dict({n.removeprefix("rm."): t for n, t in tensors.items() if n.startswith("rm.")})
        self._texts, self._units = _table(tensors["texts"]), _table(tensors["units"])
        self._choices = tensors["choices"].numpy().astype(bool)
        moments = tuple(values["normalise"])
        frozen = model.eval().requires_grad_(False)
        self.reward = LearnedReward(frozen, template.tokenizer, moments, template.batch_size, _NAME)
        self._saved = None


def _table(padded: Tensor) -> list[list[list[int]]]:
    rows = [row[row >= 0].tolist() for row in padded]
    return [rows[i : i + 2] for i in range(0, len(rows), 2)]
