"""Adam with master weights: Adam in float32 whose result is rounded; and training in bfloat16."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from lm_envs.algos.engine.agent import learn
from lm_envs.algos.engine.optimizer import MASTER, MasterAdam, make_adam
from lm_envs.algos.policies.adaptation import Adaptation, adapted
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.algos.registry import make_agent
from lm_envs.env.report import report
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextVectorEnv
from tests import tiny
from tests.algos import batches
from tests.families import build
from tests.marks import slow_unless


def steps(make, weight, gradients):
    """The weight after each of some gradients."""
    parameter = nn.Parameter(weight.clone())
    optimizer, seen = make([parameter]), []
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        seen.append(parameter.detach().clone())
    return torch.stack(seen), optimizer.state[parameter]


def adam(kind, lr):
    return lambda parameters: kind(parameters, lr=lr, eps=1e-5, fused=True)


def test_it_is_adam_in_float32_rounded():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, generator=generator).bfloat16()
    gradients = torch.randn(40, 64, generator=generator).bfloat16()
    found, state = steps(adam(MasterAdam, 1e-4), weight, gradients)
    known, other = steps(adam(torch.optim.Adam, 1e-4), weight.float(), gradients)
    assert torch.equal(found, known.bfloat16()) and torch.equal(state[MASTER], known[-1])
    assert all(torch.equal(state[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_small_steps_add_up():
    """What it is for: on bfloat16 weights alone none of them would show."""
    weight, gradients = torch.linspace(1, 1.9, 16).bfloat16(), torch.ones(200, 16)
    found, _ = steps(adam(MasterAdam, 1e-4), weight, gradients)
    lost, _ = steps(adam(torch.optim.Adam, 1e-4), weight, gradients)
    torch.testing.assert_close(found[-1].float(), weight.float() - 0.02, rtol=0, atol=2**-8 + 1e-5)
    assert torch.equal(lost[-1], weight)


def test_full_precision_is_plain_adam():
    weight, gradients = torch.linspace(-1, 1, 8).double(), torch.linspace(1, 2, 24).double().reshape(3, 8)
    found, _ = steps(adam(MasterAdam, 1e-2), weight, gradients)
    known, _ = steps(adam(torch.optim.Adam, 1e-2), weight, gradients)
    torch.testing.assert_close(found, known, rtol=0, atol=0)
    assert type(make_adam({"w": nn.Parameter(weight)}, "x", 1e-2, 1e-5)) is torch.optim.Adam


def test_who_writes_a_parameter_is_believed():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterAdam([parameter], lr=1e-4, fused=True)
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    with torch.no_grad():
        parameter[1] = 5.0
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    master = optimizer.state[parameter][MASTER]
    torch.testing.assert_close(master, torch.tensor([1 - 3e-4, 5 - 1e-4]), rtol=0, atol=2e-6)


def test_float16_is_not_trained():
    with pytest.raises(ValueError, match="ppo: .*float16, where gradients below 6e-8 are 0.*bfloat16"):
        env = TextVectorEnv(tiny.task(), 4)
        PPO(LMPolicy.for_mdp(env.mdp, tiny.gpt2(dtype=torch.float16).requires_grad_(True)))


ALL = Adaptation()


def setting(family="Llama", adaptation=ALL):
    start = build(family).bfloat16()
    env = TextVectorEnv(tiny.task(reference=start), 8, group_size=4)
    return start, env, LMPolicy.for_mdp(env.mdp, adapted(start, adaptation, seed=3))


@pytest.mark.parametrize(
    ("family", "adaptation"),
    slow_unless(
        lambda case: case[0] == "Llama" or case == ("Gemma2", ALL),
        product(["GPT2", "Llama", "Gemma2"], [ALL, Adaptation(lora_rank=2), Adaptation(freeze_layers=1)]),
    ),
)
def test_ppo_trains_in_bfloat16(family, adaptation):
    """Policy and reference in bfloat16: the ratio is 1 and the KL 0 up to its rounding."""
    start, env, policy = setting(family, adaptation)
    assert policy.model.dtype == start.dtype == torch.bfloat16 and not policy.keeps_logprob
    assert policy.value_head.weight.dtype == torch.float32
    before = {name: x.clone() for name, x in start.state_dict().items()}
    config = PPOConfig(episodes=16, group_size=4, iterations=4, epochs=2, minibatches=2, learning_rate=1e-3)
    agent = PPO(policy, config)
    traj, metrics = agent.iteration(env)
    # The update's own log-probabilities are of the same forwards, so the ratio is 1 where rows are cut alike.
    assert metrics["logprob_gap_max"] < 0.1
    gap = (traj.logprob - traj.ref_logprob)[traj.mask]
    assert float(gap.abs().max()) < 0.15 and abs(float(gap.mean())) < 0.02
    learn(agent, env, 3)
    assert np.isfinite(list(metrics.values())).all()
    assert all(torch.equal(x, before[name]) for name, x in start.state_dict().items())
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert any(not torch.equal(p, before[n.removeprefix("model.")]) for n, p in trained.items() if n[6:] in before) or (
        adaptation.lora_rank and any(bool(p.any()) for n, p in trained.items() if "lora_B" in n)
    )
    masters = [p for p in trained.values() if p.dtype == torch.bfloat16]
    assert all(torch.equal(agent.optimizer.state[p][MASTER].bfloat16(), p) for p in masters)


def test_learning_in_bfloat16_is_learning_in_float32_but_for_rounding():
    """The score goes as far up, from the same start."""
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        start = build("Llama").to(dtype)
        env = TextVectorEnv(tiny.task(reference=start, kl_coef=0.05), 8, group_size=4)
        policy = LMPolicy.for_mdp(env.mdp, copy.deepcopy(start).requires_grad_(True))
        agent = make_agent("reinforce", policy, episodes=64, group_size=4, iterations=12, learning_rate=1e-3)
        scores: list[float] = []
        learn(agent, env, callback=lambda agent, traj, metrics, scores=scores: scores.append(metrics["score"]))
        ends.append((np.mean(scores[:2]), np.mean(scores[-3:])))
    assert min(end - start for start, end in ends) > 0.3
    assert abs(ends[0][1] - ends[1][1]) < 0.3


def test_stepping_and_bulk_agree_on_forced_tokens():
    """Law 2 where rounding flips tokens: the rewards of the same tokens."""
    _, env, policy = setting()
    bulk = rollout(env, policy, episodes=8, seed=1)
    single = TextVectorEnv(env.task, 8, group_size=4)
    single.reset(seed=1)
    done, score, reference = np.zeros(8, dtype=bool), np.zeros(8), np.zeros(bulk.response.shape)
    for t in range(bulk.response.shape[1]):
        report(single, bulk.logprob[:, t].numpy())
        _, _, terminated, _, info = single.step(bulk.response[:, t].clamp(min=0).numpy())
        for row in (terminated & ~done).nonzero()[0]:
            lm = info["final_info"]["lm"]
            score[row], reference[row] = lm["score"][row], lm["ref_logprob"][row][: reference.shape[1]]
        done |= terminated
    assert done.all()
    np.testing.assert_allclose(score, bulk.score.numpy())
    np.testing.assert_allclose(reference, bulk.ref_logprob.numpy(), rtol=0, atol=0.15)


def test_a_killed_run_goes_on_bit_for_bit_with_its_master_weights():
    settings = {"episodes": 16, "group_size": 4, "iterations": 4, "learning_rate": 1e-3}
    _, env, policy = setting()
    agent = make_agent("ppo", policy, **settings)
    learn(agent, env, 2)
    tensors, counters = agent.checkpoint()
    assert any(name.startswith(f"adam.{MASTER}.") for name in tensors)
    learn(agent, env)
    _, other_env, other = setting()
    twin = make_agent("ppo", other, **settings)
    twin.restore(tensors, counters)
    learn(twin, other_env)
    assert batches.same(twin.checkpoint()[0], agent.checkpoint()[0])
    dropped = {name: x for name, x in tensors.items() if not name.startswith(f"adam.{MASTER}.")}
    third = make_agent("ppo", setting()[2], **settings)
    with pytest.raises(KeyError):  # negative control: without them there is nothing to go on from
        third.restore(dropped, counters)
        learn(third, other_env)
