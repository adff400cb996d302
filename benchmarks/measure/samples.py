"""Measuring a policy: a sample for each prompt of a split, scored by the training reward (proxy) and the judge (gold).

Prompts come in order, each once, so all policies answer the same ones; the tokens' random numbers are a function of the
seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lm_envs.algos.best_of_n import BestOfN, kl_bound
from lm_envs.algos.engine.settings_by_size import rows_at_once
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import TextMDP
from lm_envs.env.rollout import RespondingPolicy, rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.feedback.annotators import votes
from lm_envs.feedback.study import Item, Response
from lm_envs.model.decoding import greedy
from lm_envs.processes.sharing import total
from lm_envs.reward.base import leaves
from lm_envs.reward.metrics import TextMetric
from lm_envs.reward.units import Samples
from lm_envs.tasks.base import TextTask
from lm_envs.trajectories import Trajectories

# Far from the seeds people train with, and from each other: the SFT side of a comparison is an independent sample, so
# SFT compared with itself is near one half, not exactly there because of equal random numbers.
_POLICY_SEED = 1 << 40
_REFERENCE_SEED = 1 << 41
GREEDY = ("corpus_greedy", "corpus_gain", "corpus_gain_se")


class EachPrompt(TextMDP):
    """A task whose episode e starts from prompt e, to go through a split once."""

    def prompt_index(self, seed: int, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the prompts in order, whatever the seed."""
        return (episodes // self.group_size) % len(self.prompts)


def evaluation_env(task: TextTask, split: str, **options: Any) -> TextVectorEnv:
    """Make an environment with these options of the MDP that goes through a split once, a prompt per episode."""
    env = TextVectorEnv(task, split=split, **options)
    env.mdp = EachPrompt(task, split=split, **options)
    return env


@dataclass
class MeasuredSamples:
    """N samples of one policy, one per prompt."""

    prompt: list[str]
    response: list[str]
    finish_reason: list[str]  # "stop" or "length"
    gold: NDArray[np.float64]  # the judge's scores, NaN if the task has no judge
    proxy: NDArray[np.float64]  # the scores that training uses, before the KL penalty
    kl: NDArray[np.float64]  # nats per sequence, ``sum(log pi - log pi_ref)`` of the sample
    surprise: NDArray[np.float64]  # nats per sequence, ``-sum(log pi_ref)`` of the sample
    length: NDArray[np.int64]  # tokens, with the EOS
    tokens: list[list[int]]  # response token ids, without the EOS
    seconds: float  # time for sampling
    # Score of all responses together, out of 100, by the first text metric in the judge or the reward; NaN without one,
    # or if the task has a metric for greedy responses.
    corpus: float = math.nan

    def records(self, count: int | None = None) -> list[dict[str, Any]]:
        """Return the first ``count`` samples (None: all) in JSON's types."""
        texts = {name: getattr(self, name) for name in ("prompt", "response", "finish_reason")}
        columns = texts | {name: getattr(self, name).tolist() for name in ("gold", "proxy", "kl", "length")}
        return [dict(zip(columns, row, strict=True)) for row in list(zip(*columns.values(), strict=True))[:count]]


def sample(env: TextVectorEnv, policy: RespondingPolicy, count: int | None, seed: int) -> MeasuredSamples:
    """Sample and score a response to each of the first ``count`` prompts (None: all) of an :func:`evaluation_env`."""
    mdp = env.mdp
    whole = len(mdp.prompts) if count is None else min(count, len(mdp.prompts))
    per_prompt = max(1, policy.uniforms_per_response // mdp.max_new_tokens)
    rows = rows_at_once(sum(p.numel() for p in mdp.reference.parameters()))
    at_once = max(1, rows // per_prompt)
    start = time.perf_counter()
    parts = [
        rollout(env, policy, episodes=min(at_once, whole - first), first_episode=first, seed=seed)
        for first in range(0, whole, at_once)
    ]
    seconds = time.perf_counter() - start
    traj = Trajectories.concatenate(parts)
    assert traj.score is not None and traj.logprob is not None and traj.ref_logprob is not None
    samples, gold = judged(mdp, traj)
    scorers = [] if mdp.task.corpus_metric is not None else [mdp.task.judge, mdp.task.reward]
    return MeasuredSamples(
        prompt=samples.prompts,
        response=samples.completions,
        finish_reason=samples.finish_reasons,
        gold=gold,
        proxy=traj.score.double().numpy(),
        kl=((traj.logprob - traj.ref_logprob) * traj.mask).sum(dim=1).double().numpy(),
        surprise=-(traj.ref_logprob * traj.mask).sum(dim=1).double().numpy(),
        length=traj.response_lengths.numpy(),
        tokens=[[token for token in row if token not in mdp.eos_token_ids] for row in samples.completion_ids],
        seconds=seconds,
        corpus=corpus_score(scorers, samples.completions, samples.columns),
    )


def judged(mdp: TextMDP, traj: Trajectories) -> tuple[Samples, NDArray[np.float64]]:
    """Return a batch as rewards take it, and the judge's scores ``(B,)``, NaN if the task has no judge."""
    assert traj.prompt_index is not None and traj.response is not None
    samples = mdp.samples(traj.prompt_index.numpy(), traj.response.numpy())
    return samples, np.full(len(traj), np.nan) if mdp.task.judge is None else samples.score(mdp.task.judge)


def corpus_score(rewards: Sequence[Any], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> float:
    """Score all responses together by the first text metric among these rewards and their parts, out of 100; NaN
    without one. Responses without a reference are left out."""
    parts = (part for reward in rewards if reward is not None for part in leaves(reward))
    metric = next((part for part in parts if isinstance(part, TextMetric)), None)
    if metric is None or metric.column not in columns:
        return math.nan
    pairs = [(text, row) for text, row in zip(responses, columns[metric.column], strict=True) if row is not None]
    return metric.corpus([text for text, _ in pairs], [row for _, row in pairs]) if pairs else math.nan


def sample_policy(env: TextVectorEnv, policy: RespondingPolicy, count: int | None, seed: int) -> MeasuredSamples:
    """Return :func:`sample` with random numbers that training never uses, others for every ``seed`` of a run."""
    return sample(env, policy, count, _POLICY_SEED + seed)


def sample_reference(env: TextVectorEnv, policy: RespondingPolicy, count: int | None) -> MeasuredSamples:
    """Sample the SFT side of every win-rate, with random numbers of its own, the same for all runs."""
    return sample(env, policy, count, _REFERENCE_SEED)


class ReferenceSamples:
    """The SFT side of the runs of a process: runs of one task with the same options share what was sampled last."""

    def __init__(self) -> None:
        self._held: tuple[TextTask, Any, MeasuredSamples] | None = None

    def __call__(
        self, env: TextVectorEnv, policy: RespondingPolicy, count: int | None, options: Mapping[str, Any]
    ) -> MeasuredSamples:
        """Return :func:`sample_reference`; ``options`` are those of the MDP."""
        task, key = env.mdp.task, (env.mdp.split, count, dict(options))
        if self._held is None or self._held[0] is not task or self._held[1] != key:
            self._held = task, key, sample_reference(env, policy, count)
        return self._held[2]


def measure(
    model: PreTrainedModel, task: TextTask, *, split: str = "test", prompts: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Compare a causal LM with the task's start, by one sample of each for the same prompts.

    Args:
        model: any model with the task's vocabulary.
        prompts: number of prompts from the start of the split; None takes all.
        seed: seed of the model's samples; those of the start are always the same.

    Returns:
        ``win_rate``, ``gold``, ``proxy``, ``kl`` (nats per response, from the task's reference) and ``length``, for
        all but the last with its standard error in ``..._se``; ``start_gold`` and ``start_gold_se``.
    """
    env = evaluation_env(task, split)
    policies = [LMPolicy.for_mdp(env.mdp, each) for each in (model, task.start)]
    found, start = sample_policy(env, policies[0], prompts, seed), sample_reference(env, policies[1], prompts)
    summary = summarise(found, start, policies[0])
    named = [name + end for name in ("win_rate", "gold", "proxy", "kl") for end in ("", "_se")]
    return {name: summary[name] for name in (*named, "length")} | {
        "start_gold": float(start.gold.mean()),
        "start_gold_se": standard_error(start.gold),
    }


def wins(gold: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compare ``(N,)`` scores prompt by prompt: 1 if the judge prefers the policy's sample, 0 if the reference's, 1/2
    for a tie; NaN if a score is NaN (no judge)."""
    if gold.shape != reference.shape:
        raise ValueError(f"win-rate compares the same prompts: got {gold.shape} and {reference.shape} scores")
    known = ~(np.isnan(gold) | np.isnan(reference))
    return np.where(known, 0.5 + 0.5 * np.sign(gold - reference), np.nan)


def simulated(mdp: TextMDP, found: MeasuredSamples, reference: MeasuredSamples) -> dict[str, Any]:
    """Let the task's annotators choose between the two samples of each prompt of an :func:`evaluation_env`; return the
    share of votes for ``found``, its standard error over prompts, and the shares per prompt. Empty without annotators.
    """
    if not mdp.task.annotators:
        return {}
    columns = mdp.columns(np.arange(len(found.prompt)))
    items = [
        Item(prompt, (Response(ours, "policy"), Response(theirs, "sft")), columns={n: x[i] for n, x in columns.items()})
        for i, (prompt, ours, theirs) in enumerate(zip(found.prompt, found.response, reference.response, strict=True))
    ]
    share = votes(mdp.task.annotators, items).mean(axis=0)
    return {"simulated": float(share.mean()), "simulated_se": standard_error(share), "votes": share.tolist()}


def standard_error(values: NDArray[np.float64]) -> float:
    """Standard error of a mean of independent values: ``sqrt(sum (x - mean)^2 / (n - 1) / n)``; NaN for fewer than two.

    For a win-rate the values are the outcomes per prompt, ties as 1/2; the binomial formula would overstate it.
    """
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def distinct_2(tokens: list[list[int]]) -> float:
    """Share of different pairs of neighboring tokens among all such pairs in all responses; NaN if there are none (Li
    et al. 2016, arXiv:1510.03055). It falls with the number of responses, so compare equal numbers."""
    pairs = [pair for row in tokens for pair in zip(row[:-1], row[1:], strict=True)]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def positive_rate(scores: NDArray[np.float64], threshold: float | None) -> float:
    """Share of scores above a threshold, which a task may have for its reward or its judge; NaN without one."""
    return math.nan if threshold is None else float((scores > threshold).mean())


def measure_greedy(mdp: TextMDP, policy: Any, count: int | None) -> dict[str, Any]:
    """Score the policy's greedy responses to the first ``count`` prompts (None: all) by the task's corpus metric, with
    the gain over the reference's and its standard error.

    Empty if the task has no such metric; NaN for a policy that is no language model (best-of-n).
    """
    metric = mdp.task.corpus_metric
    if metric is None:
        return {}
    if not isinstance(policy, LMPolicy) or policy.condition is not None:
        return dict.fromkeys(GREEDY, math.nan)
    rows = list(mdp.prompts if count is None else mdp.prompts[:count])

    def answers(model: Any) -> list[str]:
        limits = {"max_new_tokens": mdp.max_new_tokens, "min_new_tokens": mdp.min_new_tokens}
        return mdp.codec.decode(rows, greedy(model, rows, mdp.eos_token_ids, **limits))[1]

    references = mdp.columns(np.arange(len(rows)))[metric.column]
    theirs = answers(mdp.reference)
    if policy.model is mdp.reference:
        return dict(zip(GREEDY, (metric.corpus(theirs, references), 0.0, 0.0), strict=True))
    ours = answers(policy.model)
    prompts, _ = mdp.codec.decode(rows, [[]] * len(rows))
    texts = list(zip(prompts, theirs, ours, strict=True))
    found = dict(zip(GREEDY, (metric.corpus(ours, references), *metric.gain(ours, theirs, references)), strict=True))
    return found | {"greedy": [dict(zip(("prompt", "sft", "response"), row, strict=True)) for row in texts[:8]]}


def summarise(
    found: MeasuredSamples, reference: MeasuredSamples, policy: Any, stats: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Compute the measured columns of a result, and per prompt ``wins``, ``golds`` and ``length_gaps``, the tokens that
    the policy's response has more than SFT's; ``sft_gold_sd`` is the standard deviation of SFT's scores over prompts.

    ``perplexity`` is that of the responses' tokens by the reference. A ``judge_threshold`` or ``reward_threshold`` in
    the task's ``stats`` adds the share of positive samples. The KL of best-of-n, whose own log-probability is unknown,
    is measured on more samples (:meth:`BestOfN.measured_kl`); ``kl_bound`` is the bound ``log n - (n - 1)/n`` beside
    it. Where n is too large, ``kl`` is the bound itself, and ``kl_is_bound``.
    """
    outcome = wins(found.gold, reference.gold)
    best = policy if isinstance(policy, BestOfN) else None
    kl, kl_se = float(found.kl.mean()), standard_error(found.kl)
    # The bound is on the KL from the policy that was sampled.
    bound = kl_bound(best.n) if best and best.policy.model is best.mdp.reference else math.nan
    measured = best.measured_kl(prompts=len(outcome)) if best else np.empty(0)
    if len(measured):  # from the base policy, and what that differs from the reference
        kl, kl_se = float(measured.mean()) + kl, math.hypot(standard_error(measured), kl_se)
    elif best:
        kl, kl_se = bound, math.nan
    inference_tokens = int(found.length.sum())
    if best:  # a process counts what it sampled
        inference_tokens = total(best.tokens_generated, "tokens of best-of-n")
        calls = total(best.reward_calls, "reward calls of best-of-n")
        scored = total(best.scored_tokens, "tokens that best-of-n's reward read")
    return {
        "win_rate": float(outcome.mean()),
        "win_rate_se": standard_error(outcome),
        "gold": float(found.gold.mean()),
        "gold_se": standard_error(found.gold),
        "gold_positive": positive_rate(found.gold, (stats or {}).get("judge_threshold")),
        "proxy": float(found.proxy.mean()),
        "proxy_se": standard_error(found.proxy),
        "proxy_positive": positive_rate(found.proxy, (stats or {}).get("reward_threshold")),
        "kl": kl,
        "kl_se": kl_se,
        "kl_bound": bound,
        "kl_is_bound": best is not None and not len(measured) and not math.isnan(bound),
        "length": float(found.length.mean()),
        **({} if math.isnan(found.corpus) else {"corpus": found.corpus}),
        "distinct_2": distinct_2(found.tokens),
        "perplexity": float(np.exp(found.surprise.sum() / found.length.sum())),
        "stopped": float(np.mean([reason == "stop" for reason in found.finish_reason])),
        "inference_tokens": inference_tokens,
        "inference_episodes": calls if best else len(outcome),
        "inference_reward_calls": calls if best else 0,
        **({"inference_scored_tokens": scored} if best else {}),
        "inference_s": found.seconds,
        "prompts": len(outcome),
        "wins": outcome.tolist(),
        "golds": found.gold.tolist(),
        "length_gaps": (found.length - reference.length).tolist(),
        "sft_distinct_2": distinct_2(reference.tokens),
        "sft_gold": float(reference.gold.mean()),
        "sft_gold_sd": float(reference.gold.std(ddof=1)) if len(outcome) > 1 else math.nan,
    }
