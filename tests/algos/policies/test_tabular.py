"""The tabular policy: MDP and bandit, both paths, and that it equals its table."""

import pytest
import torch

from lm_envs.algos.engine.settings_enumerable import EPISODES, TABULAR
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.policies.reward_tokens import prepend
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.mdp import TextMDP
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.tasks.enumerable import load
from tests import tiny

KINDS = {"mdp": TextVectorEnv, "bandit": TextBanditVectorEnv}
OPTIONS = dict(temperature=1.3, min_new_tokens=1)


def solver_and_table(**options):
    solver = Exact(TextMDP(load(tokens=3, horizon=3, prompts=4), **options))
    noise = torch.randn(solver.log_ref.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return solver, (solver.log_ref + noise).log_softmax(dim=2)


def test_it_is_the_table_it_was_made_of():
    solver, table = solver_and_table(**OPTIONS)
    policy = TabularPolicy(solver, table)
    torch.testing.assert_close(policy.log_probs(), table, rtol=0, atol=1e-14)
    torch.testing.assert_close(solver.table(policy), table, rtol=0, atol=1e-14)
    start = TabularPolicy(solver).log_probs().detach()
    assert float(solver.kl(start)) == pytest.approx(0, abs=1e-14)  # law 7: starts at the reference
    assert bool((policy.log_probs()[:, 0, 3] == -torch.inf).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5])
def test_law_2_and_law_7(kind, rows):
    solver, table = solver_and_table(**OPTIONS)
    env = KINDS[kind](solver.mdp.task, rows, group_size=2, **OPTIONS)
    policy = TabularPolicy(solver, table, bandit=kind == "bandit")
    bulk, stepped = (way(env, policy, episodes=60, seed=5) for way in (rollout, collect))
    assert bulk.response.tolist() == stepped.response.tolist() and set(bulk.response_lengths.tolist()) == {2, 3}
    for name in ("logprob", "reward"):
        torch.testing.assert_close(getattr(bulk, name), getattr(stepped, name), rtol=0, atol=1e-12)
    torch.testing.assert_close(policy.evaluate(bulk).logprob, bulk.logprob, rtol=0, atol=1e-12)


def test_law_3_frequencies_are_the_table():
    solver, table = solver_and_table(**OPTIONS)
    env = TextVectorEnv(solver.mdp.task, 1, **OPTIONS)
    traj = rollout(env, TabularPolicy(solver, table), episodes=50_000, seed=1)
    prompt = torch.as_tensor(env.mdp.prompt_index(1, torch.arange(50_000).numpy()))
    counts = torch.zeros(solver.score.shape)
    counts.index_put_((prompt, solver.tree.states(traj.response)[:, -1]), torch.ones(50_000), accumulate=True)
    expected = solver.sequences(table).exp() * counts.sum(dim=1, keepdim=True)
    cells = expected > 0
    chi2 = float(((counts - expected)[cells] ** 2 / expected[cells]).sum())
    assert counts[~cells].sum() == 0 and chi2 < int(cells.sum()) + 4 * (2 * int(cells.sum())) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_it_evaluates_as_the_language_model_of_the_same_table(kind):
    """Against LMPolicy on the task's own model, gradients included; NaN in masked places changes nothing (law 1)."""
    solver, _ = solver_and_table(**OPTIONS)
    model = load(tokens=3, horizon=3, prompts=4, seed=9).reference.requires_grad_(True)
    lm = LMPolicy.for_mdp(solver.mdp, model, bandit=kind == "bandit")
    table = model.lm_head.weight.T.detach().unflatten(0, (4, -1)) / 1.3
    mine = TabularPolicy(solver, table, bandit=kind == "bandit", value_scale=2.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        mine.value.normal_(generator=generator)
        lm.value_head.weight.copy_(2.0 * mine.value.unsqueeze(0))
    traj = rollout(KINDS[kind](solver.mdp.task, 1, **OPTIONS), mine, episodes=100, seed=2)
    ours, theirs = mine.evaluate(traj), lm.evaluate(traj)
    for name in ("logprob", "entropy", "value"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-12)
    if kind == "mdp":
        mask = traj.mask
        torch.testing.assert_close(ours.log_probs()[mask], theirs.log_probs()[mask], rtol=0, atol=1e-12)
    for found in (ours, theirs):
        (found.logprob.sum() + found.entropy.sum() + found.value.square().sum()).backward()
    torch.testing.assert_close(mine.logits.grad / 1.3, model.lm_head.weight.grad.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(mine.value.grad, 2.0 * lm.value_head.weight.grad[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["reinforce", "a2c", "ppo", "expert-iteration"])
def test_agents_learn_with_it(name, kind):
    task = load(tokens=2, horizon=2, prompts=2)
    env = KINDS[kind](task, 8, group_size=4)
    policy = TabularPolicy(Exact(env.mdp), bandit=kind == "bandit")
    agent = make_agent(name, policy, episodes=64, group_size=4, iterations=40, learning_rate=0.05, anneal=False)
    solver = Exact(env.mdp, kl_coef=0.0 if name == "expert-iteration" else None)
    before = float(solver.objective(policy).detach())
    first = agent.iteration(env)[1]
    assert first["kl"] == pytest.approx(0, abs=1e-12) and first.get("logprob_gap_max", 0.0) < 1e-12
    for _ in range(39):
        agent.iteration(env)
    after = float(solver.objective(policy).detach())
    assert after - before > 0.4 * (float(solver.optimal_value) - before)


@pytest.mark.parametrize("kind", KINDS)
def test_reward_tokens_have_tables_of_their_own(kind):
    solver, table = solver_and_table(**OPTIONS)
    env, policy = KINDS[kind](solver.mdp.task, 5, **OPTIONS), TabularPolicy(solver, table, bandit=kind == "bandit")
    policy.add_reward_tokens(2)
    with torch.no_grad():  # what is masked stays so
        policy.token_logits += torch.randn(policy.token_logits.shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(policy.log_probs(), table, rtol=0, atol=1e-14)  # as it was until it is asked
    policy.condition_on(1)
    own = policy.log_probs().detach()
    assert (own - table).nan_to_num().abs().max() > 0.1
    torch.testing.assert_close(solver.table(policy), own, rtol=0, atol=1e-14)
    bulk, stepped = (way(env, policy, episodes=60, seed=5) for way in (rollout, collect))
    assert bulk.response.tolist() == stepped.response.tolist()
    now = policy.evaluate(bulk)
    torch.testing.assert_close(now.logprob, bulk.logprob, rtol=0, atol=1e-12)
    given = bulk.select(slice(None))
    for token, same in ((1, True), (0, False)):
        given.prompt = prepend(bulk.prompt, policy.vocabulary + token)
        assert torch.allclose(policy.evaluate(given).logprob, now.logprob) == same
    policy.evaluate(given).logprob.sum().backward()
    grad = policy.token_logits.grad.unflatten(0, (2, -1))
    assert grad[0].abs().sum() > 0 and grad[1].abs().sum() == 0 and policy.logits.grad.abs().sum() == 0
    assert int(policy.state_dict()["condition"]) == 1 and "condition" not in TabularPolicy(solver).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TABULAR))
def test_every_algorithm_with_settings_learns_on_a_table(name):
    """Reward up from the start's on a small environment; those that learn from pairs, too."""
    task = load(tokens=2, horizon=2, prompts=2)
    overrides = {"pairs": 2000} if "pairs" in TABULAR[name] else {}
    solver = Exact(TextMDP(task))
    policy = TabularPolicy(solver)
    settings = TABULAR[name] | {"iterations": EPISODES // TABULAR[name]["episodes"]} | overrides
    agent = make_agent(name, policy, task, **settings)
    env = TextVectorEnv(task, 1, group_size=agent.config.group_size)
    for _ in range(20):
        agent.iteration(env)
    assert float(solver.reward(policy)) > float(solver.reference_value) + 0.2


def test_what_it_cannot_do_is_refused():
    solver, table = solver_and_table()
    with pytest.raises(ValueError, match="finite log-probabilities"):
        TabularPolicy(solver, table.clone().index_fill_(2, torch.tensor([1]), -torch.inf))
    with pytest.raises(ValueError, match=r"row 1 has the prompt \[3, 3\], which the table does not have"):
        TabularPolicy(solver, table)._first_row(torch.tensor([[0, 0], [3, 3]]))
    control = rollout(TextVectorEnv(solver.mdp.task, 1), TabularPolicy(solver), episodes=2)
    control.prompt = None
    with pytest.raises(ValueError, match="needs trajectories of text"):
        TabularPolicy(solver).evaluate(control)
    # A small text task of any kind will do.
    other = Exact(TextMDP(tiny.task(), max_new_tokens=2))
    traj = rollout(TextVectorEnv(tiny.task(), 1, max_new_tokens=2), TabularPolicy(other), episodes=20)
    torch.testing.assert_close(traj.logprob, traj.ref_logprob, rtol=0, atol=1e-12)
