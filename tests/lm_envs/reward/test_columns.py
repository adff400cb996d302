"""Columns of the prompts' data reach the reward and the judge, sample by sample, on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm_envs.algos.engine.comparisons import annotated_pairs
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.benchmarks.measure import samples
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.single import TextEnv
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.tasks import sampling
from tests import tiny

COLUMNS = {"train": {"bonus": [10.0, 20.0, 30.0, 40.0, 50.0]}, "test": {"bonus": [60.0, 70.0]}}


def pays_bonus(prompts, completions, bonus):
    """The column's number, which says which prompt it belongs to."""
    return list(bonus)


def task(**changes):
    return tiny.task(**{"reward": pays_bonus, "judge": pays_bonus, "columns": COLUMNS, **changes})


def expected(made, prompt: torch.Tensor) -> list[float]:
    rows = [row[row >= 0].tolist() for row in prompt]
    known = {tuple(p): COLUMNS[split]["bonus"][i] for split in COLUMNS for i, p in enumerate(made.prompts[split])}
    return [known[tuple(row)] for row in rows]


def test_stepped_bulk_and_bandit_rewards_get_the_prompts_own_row():
    made = task()
    env = TextVectorEnv(made, num_envs=3, kl_coef=0.0)
    policy = LMPolicy.for_mdp(env.mdp, made.reference)
    for found in (collect(env, policy, episodes=12, seed=1), rollout(env, policy, episodes=12, seed=1)):
        assert found.score.tolist() == expected(made, found.prompt) and len(set(found.score.tolist())) > 2
    single = TextEnv(made, kl_coef=0.0)
    obs, _ = single.reset(seed=0)
    prompt = obs[: single.mdp.prompt_length]
    assert single.step(tiny.EOS)[1] == expected(made, torch.as_tensor(prompt)[None])[0]
    bandit = TextBanditVectorEnv(made, num_envs=4, kl_coef=0.0)
    obs, _ = bandit.reset(seed=0)
    prompts = torch.as_tensor(obs[:, : bandit.mdp.prompt_length])
    actions = np.full((4, bandit.mdp.max_new_tokens), tiny.EOS)
    assert bandit.step(actions)[1].tolist() == expected(made, prompts)


def test_the_judge_and_simulated_annotators_get_them():
    made = task()
    env = samples.evaluation_env(made, "test")
    sampled = samples.sample(env, LMPolicy.for_mdp(env.mdp, made.reference), None, seed=0)
    assert sampled.gold.tolist() == sampled.proxy.tolist() == [60.0, 70.0]
    seen = []

    def noted(completions, bonus):
        seen.extend(bonus)
        return [float(i) for i in range(len(completions))]

    annotated_pairs(task(judge=noted), 5, 0.0, seed=0)
    assert seen == [10.0, 10.0, 20.0, 20.0, 30.0, 30.0, 40.0, 40.0, 50.0, 50.0]


def test_samples_carry_them():
    made = task()
    options = dict(eos_token_id=tiny.EOS, max_new_tokens=2, batch_size=4)
    found = sampling.sample(
        made.reference, made.tokenizer, made.prompts["train"], 7, **options, columns=COLUMNS["train"]
    )
    assert found.columns == {"bonus": [10.0, 20.0, 30.0, 40.0, 50.0, 10.0, 20.0]}
    assert found.score(pays_bonus).tolist() == found.columns["bonus"]


def test_a_task_without_columns_has_none():
    assert tiny.task().columns_of([[9, 9]]) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"train": {"bonus": [1.0] * 5}}}, "every split of the prompts needs the same columns"),
        ({"columns": {"train": {"bonus": [1.0] * 5}, "test": {"other": [1, 2]}}}, "needs the same columns"),
        ({"columns": {**COLUMNS, "test": {"bonus": [1.0]}}}, "1 entries of 'bonus' for the 2 prompts of test"),
        ({"columns": {s: {"prompts": c["bonus"]} for s, c in COLUMNS.items()}}, "as 'prompts': rename the column"),
        (
            {"prompts": {"train": [[1], [2, 3], [4], [1], [5]], "test": [[6], [7]]}},
            "has the prompt 'a' twice, with 'bonus' 10.0 and 40.0: keep one, or give both in a list",
        ),
    ],
)
def test_columns_that_do_not_fit_their_prompts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        task(**changes)


def test_the_same_prompt_twice_with_the_same_row_will_do():
    columns = {"train": {"bonus": [1.0, 2.0, 1.0]}, "test": {"bonus": [2.0]}}
    made = task(prompts={"train": [[1], [2], [1]], "test": [[2]]}, columns=columns)
    assert made.columns_of([[2], [1]]) == {"bonus": [2.0, 1.0]}
    with pytest.raises(ValueError, match="'c' is none of them"):
        made.columns_of([[3]])
