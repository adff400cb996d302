"""Columns of the prompts' data reach the reward and the judge, sample by sample, on every path."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lm_envs import rng
from lm_envs.algos.best_of_n import BestOfN
from lm_envs.algos.engine.comparisons import annotated_pairs
from lm_envs.algos.engine.judged_pairs import judge_pairs
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.benchmarks.measure import samples
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.single import TextBanditEnv, TextEnv
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"train": {"bonus": [1.0] * 5}}}, "every split of the prompts needs the same columns"),
        ({"columns": {"train": {"bonus": [1.0] * 5}, "test": {"other": [1, 2]}}}, "needs the same columns"),
        ({"columns": {**COLUMNS, "test": {"bonus": [1.0]}}}, "1 entries of 'bonus' for the 2 prompts of test"),
        ({"columns": {s: {"prompts": c["bonus"]} for s, c in COLUMNS.items()}}, "as 'prompts': rename the column"),
    ],
)
def test_columns_that_do_not_fit_their_prompts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        task(**changes)


# Equal prompts with different references


EQUAL = {"prompts": {"train": [[1], [2, 3], [1]]}, "columns": {"train": {"bonus": [10.0, 20.0, 30.0]}}}
ENVS = {"mdp": TextVectorEnv, "bandit": TextBanditVectorEnv}


@pytest.mark.parametrize("path", [collect, rollout])
@pytest.mark.parametrize("kind", ENVS)
def test_equal_prompts_are_scored_by_their_own_rows(kind, path):
    made = task(**EQUAL)
    env = ENVS[kind](made, num_envs=3, kl_coef=0.0)
    policy = LMPolicy.for_mdp(env.mdp, made.reference, bandit=kind == "bandit")
    found = path(env, policy, episodes=24, seed=1)
    assert found.prompt_index.tolist() == env.mdp.prompt_index(1, np.arange(24)).tolist()
    assert set(found.prompt_index.tolist()) == {0, 1, 2}
    bonus = torch.tensor(EQUAL["columns"]["train"]["bonus"], dtype=torch.float64)
    assert torch.equal(found.score, bonus[found.prompt_index])
    assert torch.equal(found.reward.where(found.mask, 0.0).sum(1), found.score)
    # Negative control: the tokens do not tell which of the two it was.
    by_tokens = {tuple(ids): i for i, ids in enumerate(made.prompts["train"])}
    looked_up = torch.tensor([by_tokens[tuple(row[row >= 0].tolist())] for row in found.prompt])
    assert not torch.equal(found.score, bonus[looked_up])


@pytest.mark.parametrize("kind", [TextEnv, TextBanditEnv])
def test_a_single_env_says_which_row_it_played(kind):
    env = kind(task(**EQUAL), kl_coef=0.0)
    env.reset(seed=1)
    played = []
    for _ in range(24):
        action = tiny.EOS if kind is TextEnv else np.full(env.mdp.max_new_tokens, tiny.EOS)
        _, reward, _, _, info = env.step(action)
        played.append(info["lm"]["prompt_index"])
        assert reward == info["lm"]["score"] == [10.0, 20.0, 30.0][played[-1]]
        env.reset()
    assert played == env.mdp.prompt_index(1, np.arange(24)).tolist()


def test_best_of_n_pairs_and_measurements_go_by_rows_too():
    seen = []

    def wants(completions, bonus):
        """The first row is paid for a "b", the last for none."""
        seen.append(list(bonus))
        return [
            (1.0 if b == 10.0 else -1.0) * text.split().count("b") for text, b in zip(completions, bonus, strict=True)
        ]

    made = task(
        reward=wants,
        judge=wants,
        prompts={"train": [[1], [1]], "test": [[1], [1]]},
        columns={s: {"bonus": [10.0, 30.0]} for s in ("train", "test")},
    )
    env = TextVectorEnv(made, 2, kl_coef=0.0)
    policy = LMPolicy.for_mdp(env.mdp, made.reference)
    traj = rollout(env, BestOfN(policy, env.mdp, 16), episodes=40, seed=0)
    b = (traj.response == 2).sum(1).double()
    first, last = (b[traj.prompt_index == row] for row in (0, 1))
    assert first.mean() > 1 and last.max() == 0
    sampled = samples.sample(samples.evaluation_env(made, "test"), policy, None, seed=0)
    assert sampled.gold.tolist() == sampled.proxy.tolist() and seen[-1] == [10.0, 30.0]
    compared = judge_pairs(env.mdp, policy, 0, 20, 0)
    index = rng.integers(0, rng.PROMPT, sampling.SAMPLE_EPISODES + np.arange(20), 2)
    assert compared.samples.columns["bonus"] == [[10.0, 30.0][i] for i in np.repeat(index, 2)]
    given = replace(made, pairs=[(1, [2, 0], [3, 0]), (0, [2, 0], [3, 0])])
    annotated = annotated_pairs(given, 2, 0.0, seed=0)
    assert seen[-1] == [30.0, 30.0, 10.0, 10.0] and annotated.prompt.tolist() == [[1]] * 4
