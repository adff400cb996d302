"""On-policy distillation: its gradients against exact ones, where it rests, and which teachers it takes."""

import pytest
import torch

from lm_envs.algos import distillation
from lm_envs.algos.engine.agent import learn
from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.exact_gradients import expected_gradient
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import Unsuited, make_agent
from lm_envs.env.mdp import TextMDP
from lm_envs.env.vector import TextVectorEnv
from lm_envs.exact.solver import Exact, cosine, relative_bias
from lm_envs.tasks.enumerable import load
from tests import tiny
from tests.algos import batches
from tests.marks import slow_unless


def problem(horizon=3, **settings):
    """A solver, an agent with a table, and its teacher's table."""
    exact = Exact(TextMDP(load(tokens=2, horizon=horizon, prompts=2)))
    generator = torch.Generator().manual_seed(1)
    tables = [exact.log_ref + torch.randn(exact.log_ref.shape, dtype=torch.float64, generator=generator) for _ in "ab"]
    agent = make_agent("distillation", TabularPolicy(exact, tables[0]), episodes=8, **settings)
    agent.teacher = TabularPolicy(exact, tables[1])
    return exact, agent, agent.teacher.log_probs().detach()


def whole_kl(exact, agent, teacher):
    return {"logits": -torch.autograd.grad(exact.kl(agent.policy, teacher), agent.policy.logits)[0]}


@pytest.mark.parametrize("same_prompt", [True, False])
def test_as_a_reward_it_has_the_gradient_of_the_kl_of_whole_responses(same_prompt):
    exact, agent, teacher = problem(horizon=2, as_reward=True)
    found = expected_gradient(agent, exact, batch=2, same_prompt=same_prompt)
    assert relative_bias({"logits": found["logits"]}, whole_kl(exact, agent, teacher)) < 1e-8


COSINE = 0.9572  # of the two gradients; docs quote this


def test_as_a_loss_it_has_the_gradient_at_the_visited_states():
    exact, agent, teacher = problem()
    found = expected_gradient(agent, exact)
    log_p = agent.policy.log_probs()
    visits = exact.visits(log_p.detach()) / len(exact.prompts)
    per_state = (visits * (log_p.exp() * (log_p - teacher)).sum(dim=2)).sum()
    target = {"logits": -torch.autograd.grad(per_state, agent.policy.logits)[0]}
    assert relative_bias({"logits": found["logits"]}, target) < 1e-8
    along = cosine({"logits": found["logits"]}, whole_kl(exact, agent, teacher))
    assert along == pytest.approx(COSINE, abs=1e-4)


def test_what_comes_after_a_token_by_hand(monkeypatch):
    """Three KLs in the first row and two in the second: later ones only, less those of the other row."""
    agent = batches.learner("distillation", as_reward=True)
    traj = batches.text_batch(episodes=4).select(torch.tensor([0, 1]))
    gap = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, float("nan")]]).double()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    traj.mask = mask
    monkeypatch.setattr(distillation, "kl_estimate", lambda *given: gap)
    with torch.no_grad():
        found = agent.prepare(traj, Before(agent.policy, traj))["advantage"]
    # Later KLs are 6, 4, 0 and 16, 0; a row that has ended counts with its last, 0.
    assert found.tolist() == [[-6 + 16, -4 + 0, 0], [-16 + 6, 0 + 4, 0]]


@pytest.mark.parametrize("as_reward", slow_unless(bool, [False, True]))
def test_it_rests_at_the_teacher(as_reward):
    task = load(tokens=2, horizon=2, prompts=2)
    env = TextVectorEnv(task, 16, group_size=1)
    exact = Exact(env.mdp)
    settings = {"learning_rate": 0.2, "episodes": 64, "iterations": 30, "max_grad_norm": 1e6, "as_reward": as_reward}
    agent = make_agent("distillation", TabularPolicy(exact), teacher="optimum", **settings)  # so that it is a regret
    learn(agent, env)
    torch.testing.assert_close(agent.teacher.log_probs(), exact.optimal_policy)
    assert not any(p.requires_grad for p in agent.teacher.parameters())
    assert exact.regret(agent.policy) < 0.05


def test_a_task_that_cannot_be_enumerated_has_no_optimum():
    with pytest.raises(ValueError, match="teacher optimum: this task cannot be enumerated: .* sequences"):
        distillation.load_teacher("optimum", TextMDP(batches.text_task(), max_new_tokens=20))


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
def test_both_envs_are_one(kind):
    ends = []
    for each in ("mdp", kind):
        env = batches.text_env(each)
        agent = batches.learner("distillation", each, env=env)
        learn(agent, env, 2)
        ends.append(batches.weights(agent.policy))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-6, atol=1e-8)


def test_a_teacher_is_a_folder_of_a_model_with_the_same_tokens(tmp_path):
    task, env = batches.text_task(), batches.text_env()
    policy = batches.text_policy(env)
    with pytest.raises(Unsuited, match="distillation needs a teacher .set `teacher` to a model's folder, or `optimum`"):
        make_agent("distillation", policy, task)
    agent = make_agent("distillation", policy, **batches.SMALL)
    with pytest.raises(ValueError, match="name its folder in the setting teacher"):
        agent.iteration(env)
    teacher = tiny.gpt2(seed=5).float()
    teacher.save_pretrained(tmp_path)
    task.tokenizer.save_pretrained(tmp_path)
    agent = make_agent("distillation", policy, task, teacher=str(tmp_path), **batches.SMALL)
    metrics = agent.iteration(env)[1]
    own = batches.text_policy(env)
    traj = batches.text_batch()
    expected = Before(batches.LMPolicy.for_mdp(env.mdp, teacher), traj).log_probs().double()
    log_p = own.evaluate(traj).log_probs().detach()
    kl = (log_p.exp() * (log_p - expected)).sum(dim=2)
    assert metrics["teacher_kl"] == pytest.approx(float(torch.where(traj.mask, kl, 0.0).sum(dim=1).mean()), rel=1e-4)
    assert not any(p.requires_grad for p in agent.teacher.model.parameters())
    tokenizer = load().tokenizer
    tokenizer.save_pretrained(tmp_path)
    agent = make_agent("distillation", policy, task, teacher=str(tmp_path), **batches.SMALL)
    with pytest.raises(ValueError, match="its tokens are not the policy's"):
        agent.iteration(env)
