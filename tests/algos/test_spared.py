"""What an update is spared, and that sparing it changes no number: kept log-probabilities and values, padding, options
of the forward."""

import copy

import pytest
import torch

from lm_envs.algos.batching import Before, micro_batches, select
from lm_envs.algos.policies import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.rollout import rollout
from lm_envs.vector_env import TextBanditVectorEnv, TextVectorEnv
from tests import tiny
from tests.algos import batches


def float32_env_and_policy(face="mdp"):
    """A policy in the precision that people train in, and an env whose reference it starts as."""
    reference = tiny.gpt2(dtype=torch.float32)
    env = (TextVectorEnv if face == "mdp" else TextBanditVectorEnv)(tiny.task(reference=reference), 4)
    policy = LMPolicy.for_mdp(env.mdp, copy.deepcopy(reference).requires_grad_(True), face)
    torch.nn.init.normal_(policy.value_head.weight)  # or every value would be zero, and nothing would show
    return env, policy


@pytest.mark.parametrize("face", ["mdp", "bandit"])
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_law_7_holds_for_what_sampling_kept_and_the_batch_is_not_evaluated_again(face, name, monkeypatch):
    env, policy = float32_env_and_policy(face)
    agent = make_agent(name, policy, episodes=8, group_size=1 if name == "ppo" else 8, epochs=1, minibatches=1)
    if name == "grpo":
        env.mdp.group_size = 8
    forwards = []
    evaluate = policy.evaluate
    monkeypatch.setattr(policy, "evaluate", lambda traj: forwards.append(len(traj)) or evaluate(traj))
    _, metrics = agent.iteration(env)
    assert forwards == [8]  # the update's own
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5) and 0 < metrics["logprob_gap_max"] < 1e-5


@pytest.mark.parametrize("face", ["mdp", "bandit"])
def test_what_sampling_kept_is_what_a_forward_gives(face):
    env, policy = float32_env_and_policy(face)
    traj = rollout(env, policy, episodes=8)
    kept, fresh = Before(policy, traj, kept=True), Before(policy, traj)
    torch.testing.assert_close(kept.value, fresh.value, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept.logprob, fresh.logprob, rtol=0, atol=1e-5)
    assert fresh.value[:, 0].std() > 1e-3 and not kept.was_read
    kept.entropy  # noqa: B018 - needs the forward
    assert kept.was_read


def test_another_policys_log_probabilities_are_not_kept():
    """Negative control: after a step, and for a batch given from outside, the policy is evaluated."""
    env, policy = float32_env_and_policy()
    agent = make_agent("ppo", policy, episodes=8, epochs=1, minibatches=1, learning_rate=0.1)
    traj, _ = agent.iteration(env)
    metrics = agent.update(traj)
    assert metrics["logprob_gap_max"] > 1e-3 and metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    policy.autocast = torch.bfloat16
    assert not policy.keeps_logprob


def test_selected_rows_carry_no_foreign_padding():
    traj = batches.text_batch()
    row = int(traj.lengths.argmin())
    part, fixed = select(traj, {"t": traj.mask.double(), "row": torch.arange(len(traj))}, torch.tensor([row]))
    steps, prompt = int(traj.lengths[row]), int((traj.prompt[row] >= 0).sum())
    assert part.mask.shape == (1, steps) and part.prompt.shape == (1, prompt) and part.obs.shape == (1, prompt + steps)
    assert fixed["t"].shape == (1, steps) and fixed["row"].tolist() == [row]
    assert steps < traj.mask.shape[1] and part.response.shape == (1, steps)


def test_micro_batches_go_by_length():
    traj = batches.text_batch()
    parts = micro_batches(traj, "token", 2)
    lengths = [traj.lengths[rows].tolist() for rows in parts]
    assert sum(lengths, []) == sorted(traj.lengths.tolist())
    assert sorted(torch.cat(parts).tolist()) == list(range(len(traj)))


@pytest.mark.parametrize("option", [dict(gradient_checkpointing=True), dict(autocast=torch.bfloat16)])
def test_options_of_the_forward_change_no_number_beyond_their_rounding(option):
    env, policy = float32_env_and_policy()
    traj = rollout(env, policy, episodes=8)
    same = LMPolicy.for_mdp(env.mdp, copy.deepcopy(policy.model), **option)
    same.value_head.load_state_dict(policy.value_head.state_dict())
    recomputed = []
    same.model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    gradients = []
    for one in (policy, same):
        now = one.evaluate(traj)
        ((now.logprob.sum() + now.value.sum()) / 8).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    assert len(recomputed) == (2 if "gradient_checkpointing" in option else 1)
    assert not any(module.training for module in same.model.modules())
    error = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    assert error < 1e-6 if "gradient_checkpointing" in option else 1e-4 < error < 0.1
    response = rollout(env, same, episodes=8)
    torch.testing.assert_close(response.logprob, same.evaluate(response).logprob.double(), rtol=0, atol=0.1)
