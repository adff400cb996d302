"""The result of a control environment, played again a row at a time; and the texts that a text run logs."""

from __future__ import annotations

import math
import statistics

import gymnasium
import pytest
import torch

from lm_envs.benchmarks.run import problems
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.env.rollout import collect
from tests.benchmarks.fake_task import NAME

PLAN = Plan(iterations=1, test_prompts=4, validation_prompts=4)


@pytest.fixture(scope="module")
def problem():
    return problems.open_problem(RunSpec("CartPole-v1", "a2c", 3, PLAN))


def played(problem, episodes: int, seed: int) -> list[int]:
    """The lengths of episodes: CartPole pays 1 a step."""
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    env = gymnasium.make_vec("CartPole-v1", problems.ROWS, vectorization_mode="sync", vector_kwargs=mode)
    with torch.no_grad():
        traj = collect(env, problem.policy, episodes=episodes, seed=seed)
    return [sum(row) for row in traj.mask.tolist()]


def test_the_result_of_a_control_environment(problem):
    lengths = played(problem, 100, 2**21 + 3)  # no seed of training, and another one for each run
    assert len(set(lengths)) > 10
    found, records = problem.evaluate()
    assert records == [] and found["proxy"] == found["length"] == pytest.approx(statistics.mean(lengths))
    assert found["proxy_se"] == pytest.approx(statistics.stdev(lengths) / 10)
    assert (found["inference_tokens"], found["inference_episodes"]) == (sum(lengths), 100)
    assert all(math.isnan(found[name]) for name in ("win_rate", "gold", "kl"))
    curve = played(problem, 20, 2**20)  # the same episodes for every seed and point
    assert problem.validate() == ({"return": statistics.mean(curve), "length": statistics.mean(curve)}, [])


def test_the_texts_of_a_batch_have_their_scores_and_frozen_weights_are_not_trained():
    spec = RunSpec(NAME, "reinforce", 0, PLAN, overrides={"episodes": 4}, adaptation={"freeze_layers": 1})
    problem = problems.open_problem(spec)
    traj, _ = problem.agent.iteration(problem.env)
    words = problem.task.tokenizer.convert_ids_to_tokens
    expected = []
    for row in range(2):
        prompt, response = (
            " ".join(words([i for i in ids[row].tolist() if i >= 0 and i not in problem.task.eos_token_ids]))
            for ids in (traj.prompt, traj.response)
        )
        expected.append(f"{prompt} |  {response}  ({traj.score[row]:.2f})")
    assert problem.texts(traj) == expected
    every, free = ([p for p in problem.policy.parameters() if p.requires_grad or keep] for keep in (True, False))
    sizes = problem.sizes(problem.policy.model)
    assert sizes["trainable_parameters"] == sum(p.numel() for p in free) < sum(p.numel() for p in every)
