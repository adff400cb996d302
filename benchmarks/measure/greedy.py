"""Greedy responses to a whole split, and what a task's corpus metric says of them: corpus BLEU, for one."""

from __future__ import annotations

import math
from typing import Any

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import TextMDP
from lm_envs.model.decoding import greedy

COLUMNS = ("corpus_greedy", "corpus_gain", "corpus_gain_se")


def measure(mdp: TextMDP, policy: Any, count: int | None) -> dict[str, Any]:
    """The metric of the policy's greedy responses, and how much higher it is than the reference's, with the standard
    error of that.

    Nothing where the task has no such metric; NaN for a policy that is no language model (best-of-n).

    Args:
        mdp: with the prompts of the split.
        policy: what is measured.
        count: the first so many prompts; None: all.
    """
    metric = mdp.task.corpus_metric
    if metric is None:
        return {}
    if not isinstance(policy, LMPolicy) or policy.condition is not None:
        return dict.fromkeys(COLUMNS, math.nan)
    rows = list(mdp.prompts if count is None else mdp.prompts[:count])

    def answers(model: Any) -> list[str]:
        found = greedy(
            model, rows, mdp.eos_token_ids, max_new_tokens=mdp.max_new_tokens, min_new_tokens=mdp.min_new_tokens
        )
        return mdp.codec.decode(rows, found)[1]

    references = mdp.task.columns_of(rows)[metric.column]
    theirs = answers(mdp.reference)
    if policy.model is mdp.reference:
        return {"corpus_greedy": metric.corpus(theirs, references), "corpus_gain": 0.0, "corpus_gain_se": 0.0}
    ours = answers(policy.model)
    prompts, _ = mdp.codec.decode(rows, [[]] * len(rows))
    texts = list(zip(prompts, theirs, ours, strict=True))
    gain, error = metric.gain(ours, theirs, references)
    return {
        "corpus_greedy": metric.corpus(ours, references),
        "corpus_gain": gain,
        "corpus_gain_se": error,
        "greedy": [dict(zip(("prompt", "sft", "response"), row, strict=True)) for row in texts[:8]],
    }
