"""What an update is spared, and that sparing it changes no number: kept log-probabilities and values, padding, options
of the forward."""

import copy

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from lm_envs.algos.engine.batching import Before, cost_of_a_forward, micro_batches, select
from lm_envs.algos.policies.adaptation import Adaptation, adapted
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.model import layers
from lm_envs.trajectories import Trajectories
from tests import tiny
from tests.algos import batches


def float32_env_and_policy(kind="mdp"):
    """A policy in the precision that people train in, and an env whose reference it starts as."""
    reference = tiny.gpt2(dtype=torch.float32)
    env = (TextVectorEnv if kind == "mdp" else TextBanditVectorEnv)(tiny.task(reference=reference), 4)
    policy = LMPolicy.for_mdp(env.mdp, copy.deepcopy(reference).requires_grad_(True), bandit=kind == "bandit")
    torch.nn.init.normal_(policy.value_head.weight)  # or every value would be zero, and nothing would show
    return env, policy


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_law_7_holds_for_what_sampling_kept_and_the_batch_is_not_evaluated_again(kind, name, monkeypatch):
    env, policy = float32_env_and_policy(kind)
    agent = make_agent(name, policy, episodes=8, group_size=1 if name == "ppo" else 8, epochs=1, minibatches=1)
    if name == "grpo":
        env.mdp.group_size = 8
    forwards = []
    evaluate = policy.evaluate
    monkeypatch.setattr(policy, "evaluate", lambda traj: forwards.append(len(traj)) or evaluate(traj))
    _, metrics = agent.iteration(env)
    assert forwards == [8]  # the update's own
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5) and 0 < metrics["logprob_gap_max"] < 1e-5


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
def test_what_sampling_kept_is_what_a_forward_gives(kind):
    env, policy = float32_env_and_policy(kind)
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


def test_texts_are_cut_by_length_where_that_is_worth_a_forward():
    traj = batches.text_batch()
    free, dear = (micro_batches(traj, "token", None, forward) for forward in (0.0, 1e9))
    assert dear == [None] == micro_batches(traj, "token", None) == micro_batches(traj, "group", None, 0.0)
    assert len(free) > 1 and sorted(torch.cat(free).tolist()) == list(range(len(traj)))
    alike = traj.select(torch.zeros(16, dtype=torch.int64))
    assert micro_batches(alike, "token", None, 0.0) == [None]  # nothing is padded
    # By hand: 2 rows of 1 token and 2 of 9 to prompts of 1 are 40 tokens whole, and 4 + 20 and a forward in halves.
    prompt, length = torch.ones(4, 1, dtype=torch.int64), torch.tensor([9, 1, 9, 1])
    mask = torch.arange(9) < length.unsqueeze(1)
    ended = torch.ones(4, dtype=torch.bool)
    small = Trajectories(actions=mask.long(), mask=mask, terminated=ended, truncated=~ended)
    small.prompt, small.response = prompt, torch.where(mask, 1, -1)
    for forward, parts in ((15.9, 2), (16.1, 1)):
        assert len(micro_batches(small, "token", None, forward)) == parts


@pytest.mark.parametrize("name", ["ppo", "a2c", "reinforce", "sft"])
def test_law_8_cutting_by_length_does_not_change_the_gradient(name, monkeypatch):
    traj, found = batches.batch_for(name), []
    for forward in (1e9, 0.0):
        agent = batches.learner(name, epochs=1, minibatches=1, max_grad_norm=1e9)
        agent.forward_cost, sizes, evaluate = forward, [], agent.policy.evaluate

        def spy(part, sizes=sizes, evaluate=evaluate):
            sizes.append(len(part) if torch.is_grad_enabled() else 0)
            return evaluate(part)

        monkeypatch.setattr(agent.policy, "evaluate", spy)
        monkeypatch.setattr(agent.optimizer, "step", lambda a=agent: found.append(batches.gradients(a.policy)))
        agent.update(traj)
        assert sum(sizes) == len(traj) and (max(sizes) < len(traj)) == (forward == 0.0)
    assert max(float((found[0][n] - found[1][n]).abs().max()) for n in found[0]) < 1e-9


def test_what_a_forward_costs_goes_by_the_number_of_weights_and_their_size():
    small, large = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(8, 8, bias=False)
    assert cost_of_a_forward(small) == 4 * cost_of_a_forward(large)
    assert cost_of_a_forward(torch.nn.Sequential(small, small, torch.nn.Linear(4, 4, bias=False))) == cost_of_a_forward(
        small
    )
    assert cost_of_a_forward(torch.nn.Linear(4, 4, device="meta")) is None


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


def test_adapters_add_nothing_to_what_recomputation_keeps(monkeypatch):
    """Their second product is as wide as the layer's own, and next to no work to compute again."""
    kept = []

    def policy(context, operation, *given, **more):
        found = chosen(context, operation, *given, **more)
        if found is CheckpointPolicy.MUST_SAVE and not context.is_recompute:
            kept.append(operation)
        return found

    chosen = layers._policy
    monkeypatch.setattr(layers, "_policy", policy)
    base = tiny.gpt2(dtype=torch.float32)
    counts = []
    for rank in (0, 1):
        kept.clear()
        model = adapted(base, Adaptation(lora_rank=rank), 0) if rank else copy.deepcopy(base).requires_grad_(True)
        with layers.checkpointing(model, keep_products=True):
            model(torch.arange(6)[None], use_cache=False).logits.sum().backward()
        counts.append(len(kept))
    assert counts[0] == counts[1] > 0
