"""Suites are read strictly: what is wrong is told with file, line and the near names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.names import (
    base_task,
    best_of,
    check_algorithm,
    check_task,
    folder_name,
    is_control,
    method_name,
)
from lm_envs.benchmarks.run.suite_files import BUILT_IN, load_suite, parse_suite

GOOD = """
name = "mine"
tasks = ["reviews", "reviews-bandit"]
algorithms = ["sft", "best-of-4", "ppo"]
seeds = [0, 3]

[budget]
episodes = 1000

[evaluation]
test_prompts = 50
validation_prompts = 20
every = 5

[checkpoints]
every = 7

[algorithm.ppo]
learning_rate = 1e-4
clip = 0.3

[task.reviews-bandit]
algorithms = ["ppo"]
kl_coef = 0.2

[task.reviews-bandit.algorithm.ppo]
clip = 0.1
"""


@pytest.mark.parametrize("path", sorted(BUILT_IN.glob("*.toml")), ids=lambda path: path.stem)
def test_built_in_suites_parse_and_their_settings_exist(path):
    from lm_envs.benchmarks.run.compare import check_runs

    suite = load_suite(path.stem)
    assert suite == load_suite(path)
    assert suite.name == path.stem
    assert suite.description
    check_runs(suite.runs())


def test_demo_compares_the_six_methods_and_both_faces():
    runs = {(run.task, run.algorithm) for run in load_suite("demo").runs()}
    methods = {"sft", "best-of-16", "expert-iteration", "reinforce", "a2c", "ppo"}
    assert {algorithm for task, algorithm in runs if task == "reviews"} == methods
    assert {algorithm for task, algorithm in runs if task == "reviews-bandit"} == {"reinforce", "ppo"}


def test_what_a_suite_says_reaches_its_runs():
    suite = parse_suite(GOOD, "mine.toml")
    runs = {run.label: run for run in suite.runs()}
    assert len(runs) == 2 * 3 + 2
    plain, bandit = runs["reviews/ppo/seed-3"], runs["reviews-bandit/ppo/seed-3"]
    assert plain.overrides == {"learning_rate": 1e-4, "clip": 0.3}
    assert bandit.overrides == {"learning_rate": 1e-4, "clip": 0.1}
    assert (plain.env, bandit.env) == ({}, {"kl_coef": 0.2})
    plan = plain.plan
    assert (plan.episodes, plan.iterations, plan.test_prompts, plan.validation_prompts) == (1000, None, 50, 20)
    assert (plan.validate_every, plan.checkpoint_every) == (5, 7)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds =", "sedes =", r"mine.toml, line 5: the suite has no key 'sedes': did you mean 'seeds'"),
        ("episodes =", "episode =", r"mine.toml, line 8: \[budget\] has no key 'episode': did you mean 'episodes'"),
        ("episodes = 1000", "episodes = 0", r"line 8: \[budget\]: episodes must be at least 1 or none, not 0"),
        ("episodes = 1000", "episodes = 10\niterations = 3", "takes one of iterations, episodes"),
        ('"ppo"]\nseeds', '"pppo"]\nseeds', r"line 4: no algorithm 'pppo': did you mean 'ppo'"),
        ('tasks = ["reviews",', 'tasks = ["review",', r"line 3: no task 'review': did you mean 'reviews'"),
        ("seeds = [0, 3]", "seeds = [0, 0]", "line 5: the suite: seeds must be a list that names nothing twice"),
        ("seeds = [0, 3]", 'seeds = "0"', "line 5: the suite: seeds must be a list, not '0'"),
        ("[algorithm.ppo]", "[algorithm.a2c]", "line 18: settings for 'a2c', which this suite does not run"),
        (
            "[task.reviews-bandit]",
            "[task.reviews-bandits]",
            r"task.reviews-bandits\] is about no task.*did you mean 'reviews-bandit'",
        ),
        ("kl_coef", "kl_coeff", r"\[task.reviews-bandit\] has no key 'kl_coeff': did you mean 'kl_coef'"),
        ("seeds = [0, 3]", "seeds = [0, 3", r"mine.toml, line \d+: not TOML"),
        ('tasks = ["reviews", "reviews-bandit"]', "", "the suite needs 'tasks'"),
    ],
)
def test_mistakes_are_told_with_place_and_remedy(old, new, message):
    assert old in GOOD
    with pytest.raises(UserError, match=message):
        parse_suite(GOOD.replace(old, new), "mine.toml")


def test_a_suite_that_is_not_there_names_the_built_in_ones():
    with pytest.raises(UserError, match="no suite 'dmeo'.*did you mean 'demo'"):
        load_suite("dmeo")


def test_names():
    assert base_task("reviews-bandit") == ("reviews", "bandit")
    assert base_task("reviews") == ("reviews", "mdp")
    assert [best_of(n) for n in ("best-of-16", "best-of-0", "best-of-n", "ppo")] == [16, None, None, None]
    assert best_of("soft-best-of-8") == 8 and best_of("hard-best-of-8") is None
    assert (best_of("best-of-99999"), best_of("best-of-100000")) == (99999, None)
    assert [method_name(task, "ppo") for task in ("reviews", "reviews-bandit")] == ["ppo", "ppo (bandit)"]
    assert folder_name("lm_envs/Cat-v0") == "lm_envs_Cat-v0" and folder_name("my.task v1.5") == "my.task_v1.5"
    assert [is_control(name) for name in ("CartPole-v1", "Own-v12", "reviews", "x-v1.py")] == [True, True, False, False]
    with pytest.raises(UserError, match="did you mean 'best-of-16'"):
        check_algorithm("bo16")
    check_task("CartPole-v1")
    check_algorithm("best-of-3")
    with pytest.raises(UserError, match="CartPol"):
        check_task("CartPol-v1")
    with pytest.raises(UserError, match="is called 'reviews-bandit' here"):
        check_task("lm_envs/ReviewsBandit-v0")
    with pytest.raises(UserError, match="as in best-of-16"):
        check_algorithm("best-of-n")
    with pytest.raises(UserError, match="no algorithm 'reward-modelling'"):  # it trains no policy
        check_algorithm("reward-modelling")


def test_all_are_all_that_train_a_policy_and_the_two_that_need_no_training():
    from lm_envs.benchmarks.commands.compare import Compare
    from lm_envs.benchmarks.run.names import expanded, trainable

    suite = load_suite("all")
    assert suite.algorithms == ("sft", "best-of-16", *trainable()) and suite.seeds == (0, 1, 2)
    assert {"ppo", "dpo", "quark", "iterated-rlhf"} < set(suite.algorithms)
    assert not {"reward-modelling", "best-of-n"} & set(suite.algorithms)
    asked = Compare(out=Path("out"), task=("reviews",), algorithms=("all",)).to_suite()
    assert asked.algorithms == suite.algorithms and asked.overrides == suite.overrides and asked.seeds == suite.seeds
    assert expanded(["ppo", "all"])[0] == "ppo" and len(set(expanded(["ppo", "all"]))) == len(suite.algorithms)
    assert expanded(["ppo"]) == ("ppo",)
