"""A few-shot prompt: what the policy reads, for chats and for text, and what its samples are measured by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lm_envs.algos.few_shot import FewShot
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import Unsuited
from lm_envs.benchmarks.measure import samples
from lm_envs.benchmarks.run.problems import open_problem
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.data.splits import SPLITS
from lm_envs.env.rollout import rollout
from lm_envs.tasks import load
from tests import tiny
from tests.lm_envs import byo

EXAMPLES = [("a b", "c d"), ("e", "f")]


def env_of(task):
    return samples.evaluation_env(task, "test")


def test_in_text_examples_stand_before_the_prompt_and_law_3_holds():
    env = env_of(tiny.task(examples=EXAMPLES))
    model = LMPolicy.for_mdp(env.mdp, env.mdp.reference)
    policy = FewShot(model, env.mdp)
    assert policy.prompt(1) == [1, 2, 3, 4, 5, 6, 6, 2, 1]  # a b, c d, e, f, and the prompt f b a
    traj = rollout(env, policy, episodes=2)
    shown = torch.tensor([[-1] * 2 + policy.prompt(0), policy.prompt(1)])
    uniforms = np.random.default_rng(0).random((2, 6))
    response, logprob, value = policy.answer(torch.arange(2), traj.prompt, torch.as_tensor(uniforms))
    again, known = model.respond(shown, torch.as_tensor(uniforms))
    assert value is None and torch.equal(response, again) and torch.equal(logprob, known)
    # The reference reads the plain prompt, so the KL of a sample is log p(y | examples, x) - log p(y | x).
    plain = env.mdp.reference_logprob(traj.prompt, traj.response).double()
    torch.testing.assert_close(traj.ref_logprob, plain[:, : traj.mask.shape[1]])
    assert not torch.allclose(traj.logprob[traj.mask], traj.ref_logprob[traj.mask])


def test_in_a_chat_examples_are_earlier_turns_behind_the_systems(tmp_path):
    tokenizer = byo.byte_level_bpe()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    folder = tmp_path / "policy"
    byo.llama(len(tokenizer), context=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    rows = [{"prompt": [turns[0], {**turns[1], "content": split[:2].upper()}], "split": split} for split in SPLITS]
    prompts = byo.write_jsonl(tmp_path / "p.jsonl", rows)
    shown = byo.write_jsonl(tmp_path / "e.jsonl", [{"prompt": "q", "completion": "a"}])
    own = {"policy": str(folder), "prompts": str(prompts), "reward": "lm_envs.reward.lengths:tokens"}
    with pytest.warns(UserWarning, match="1 test prompt"):
        task = load("custom", **own, examples=str(shown))
    env = env_of(task)
    policy = FewShot(LMPolicy.for_mdp(env.mdp, task.start), env.mdp)
    assert tokenizer.decode(policy.prompt(0)) == "<system>S<user>q<assistant>a<user>TE<assistant>"
    with pytest.raises(ValueError, match=r"a prompt with 40 examples .* more than the model's context of 256"):
        many = env_of(replace(task, examples=[("q", "a")] * 40))
        FewShot(policy.policy, many.mdp).prompt(0)
    wrong = byo.write_jsonl(tmp_path / "w.jsonl", [{"messages": [*turns, {"role": "assistant", "content": "a"}]}])
    with pytest.raises(ValueError, match=r"w.jsonl, line 1: an example is a prompt and a completion, both texts"):
        load("custom", **own, examples=str(wrong))


def spec(**changes):
    given = {
        "task": "tests.algos.test_few_shot:shown",
        "algorithm": "prompted",
        "seed": 0,
        "plan": Plan(test_prompts=2),
    }
    return RunSpec(**{**given, **changes})


def shown():
    return tiny.task(examples=EXAMPLES)


def without():
    return tiny.task()


def test_it_is_measured_and_not_trained():
    problem = open_problem(spec())
    found, records = problem.evaluate()
    assert problem.agent is None and len(records) == 2 and found["kl"] == np.mean([r["kl"] for r in records]) != 0
    assert found["inference_reward_calls"] == 0
    with pytest.raises(ValueError, match="has no examples to show"):
        env = env_of(tiny.task())
        FewShot(LMPolicy.for_mdp(env.mdp, env.mdp.reference), env.mdp)
    with pytest.raises(Unsuited, match="prompted needs examples to show, which the task does not have"):
        open_problem(spec(task="tests.algos.test_few_shot:without"))
    with pytest.raises(Unsuited, match="needs no training, so it has no bandit env"):
        open_problem(spec(task="tests.algos.test_few_shot:shown-bandit"))
