"""What an update reports and what an iteration counts, computed again from the trajectories."""

import math

import gymnasium
import pytest
import torch

from lm_envs.algos.engine.agent import learn
from lm_envs.algos.engine.sampling import charge, draw
from lm_envs.algos.policies.mlp import MLPPolicy
from lm_envs.algos.registry import make_agent
from tests.algos import batches


def real(x, traj):
    return x[traj.mask].tolist()


def variance(values):
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / len(values)


def test_the_critics_explained_variance_by_hand():
    traj = batches.text_batch()
    agent = batches.learner("ppo", lam=1.0, epochs=1, minibatches=1)
    value = real(agent.policy.evaluate(traj).value[:, :-1].detach(), traj)
    target = real(torch.where(traj.mask, traj.reward, 0.0).flip(1).cumsum(1).flip(1), traj)  # lambda 1: the return
    error = [t - v for t, v in zip(target, value, strict=True)]
    assert agent.update(traj)["explained_variance"] == pytest.approx(1 - variance(error) / variance(target))


def test_the_samplers_kl_is_measured_before_the_first_step_alone():
    traj, found = batches.text_batch(), []
    for epochs in (1, 2):
        agent = batches.learner("ppo", epochs=epochs, minibatches=1, learning_rate=0.1)
        agent.policy.temperature = 1.3
        now, sampled = (real(x, traj) for x in (agent.policy.evaluate(traj).logprob, traj.logprob))
        found.append(agent.update(traj))
    gap = [a - b for a, b in zip(now, sampled, strict=True)]
    kl = [math.exp(x) - 1 - x for x in gap]  # on samples of the sampler: rho - 1 - log rho
    for metrics in found:
        assert metrics["logprob_gap_max"] == pytest.approx(max(map(abs, gap)))
        assert metrics["sampler_kl"] == pytest.approx(sum(kl) / len(kl))


def test_the_early_stop_reads_its_own_minibatch(monkeypatch):
    """Not the mean over those before it, which lags behind while the policy moves away."""
    traj, settings = batches.text_batch(), {"epochs": 4, "minibatches": 2, "learning_rate": 5e-3, "micro_batch": 16}
    agent, seen = batches.learner("ppo", **settings), []
    whole = agent.loss

    def loss(*given):
        found = whole(*given)
        seen.append(float(found[1]["approx_kl"]))
        return found

    monkeypatch.setattr(agent, "loss", loss)
    agent.update(traj)
    number = max(range(8), key=seen.__getitem__)
    others = max(seen[:number])
    assert len(seen) == 8 and number > 2 and others < seen[number]
    assert sum(seen[: number + 1]) / (number + 1) < (limit := (others + seen[number]) / 2)
    assert batches.learner("ppo", kl_stop=limit, **settings).update(traj)["updates"] == number


def test_minibatches_are_numbered_through_the_run(monkeypatch):
    """The number decides which demonstrations are learned from beside it."""
    agent, seen = batches.learner("ppo-ptx", epochs=2, minibatches=3), []
    whole = agent.mixture
    monkeypatch.setattr(agent, "mixture", lambda number: seen.append(number) or whole(number))
    for _ in range(2):
        agent.update(batches.text_batch())
    assert seen == list(range(12))


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
def test_what_an_iteration_of_text_counts(kind):
    env = batches.text_env(kind)
    agent = batches.learner("ppo", kind, env=env, epochs=3)
    tokens = 0
    for iteration in range(1, 3):
        traj, metrics = agent.iteration(env)
        tokens += int((traj.response >= 0).sum())
        steps = tokens if kind == "mdp" else 16 * iteration
        assert metrics["tokens"] == agent.tokens_done == tokens
        assert metrics["steps"] == agent.steps_done == steps
        assert metrics["trained_tokens"] == 3 * tokens
        assert metrics["episodes"] == agent.samples_done == metrics["reward_calls"] == 16 * iteration
        assert metrics["iteration"] == iteration - 1
    assert int(traj.mask.sum()) == (int((traj.response >= 0).sum()) if kind == "mdp" else 16)


def test_demonstrations_beside_the_samples_are_trained_tokens_too():
    agent, traj = batches.learner("ppo-ptx", epochs=1, minibatches=1, demonstrations=5), batches.text_batch()
    _, chosen = agent.mixture(0)
    agent.update(traj)
    assert agent.trained_tokens == int((traj.response >= 0).sum()) + int((chosen.response >= 0).sum())


def test_samples_beside_the_batches_are_charged_with_their_ends():
    agent = batches.learner("rloo")
    prompt, response = torch.tensor([[-1, 0], [4, 4]]), torch.tensor([[3, 0, -1], [2, 2, 2]])
    charge(agent, prompt, response)  # EOS, 0, is a token like others
    assert (agent.samples_done, agent.reward_calls, agent.tokens_done, agent.episodes_done) == (2, 2, 5, 0)
    assert agent.scored_tokens == 3 + 5


class Counted(gymnasium.Wrapper):
    """CartPole that counts its steps over all copies."""

    taken: list[int] = []

    def step(self, action):
        self.taken.append(1)
        return super().step(action)


def test_what_an_iteration_of_control_counts():
    """Rows whose episodes are not wanted any more step on until the last wanted one has ended, and are charged."""
    env = gymnasium.vector.SyncVectorEnv(
        [lambda: Counted(gymnasium.make("CartPole-v1"))] * 3, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
    )
    agent = make_agent(
        "reinforce", MLPPolicy(env, hidden=(8,)), episodes=4, group_size=1, baseline="value", iterations=3
    )
    Counted.taken.clear()
    steps, starts = 0, set()
    for _ in range(2):
        traj, metrics = agent.iteration(env)
        steps += int(traj.mask.sum())
        starts |= {tuple(row.tolist()) for row in traj.obs[:, 0]}
    assert len(starts) == 8  # each episode starts by its own number
    assert agent.steps_done == metrics["steps"] == len(Counted.taken) > steps == agent.tokens_done
    assert agent.episodes_done == agent.samples_done == 8 and agent.reward_calls == 0
    assert metrics["return"] == metrics["length"] == pytest.approx(float(traj.lengths.double().mean()))


def test_fragments_start_by_the_seed_and_the_iteration():
    def first(seed, iterations):
        env = batches.control_env()
        agent = make_agent("ppo", MLPPolicy(env, hidden=(8,)), steps=8, episodes=None, seed=seed)
        agent.iterations_done = iterations
        return tuple(agent.sample(env).obs[0, 0].tolist())

    assert len({first(0, 0), first(1, 0), first(0, 1), first(1, 1)}) == 4 and first(1, 1) == first(1, 1)


def test_draws_of_different_size_weigh_by_their_rows():
    env = batches.text_env(group_size=2)
    agent = batches.learner("grpo", env=env, group_size=2, informative=True, draws=4)
    parts, sample = [], agent.sample
    agent.sample = lambda env: parts.append(sample(env)) or parts[-1]
    agent.settle_kl_coef(env)
    whole, learned, metrics = draw(agent, env, 0)
    assert len({len(part) for part in parts}) > 1 and len(whole) == sum(map(len, parts))
    rows = [float((part.logprob - part.ref_logprob)[i][part.mask[i]].sum()) for part in parts for i in range(len(part))]
    assert metrics["kl"] == pytest.approx(sum(rows) / len(rows))
    assert metrics["length"] == pytest.approx(float(whole.lengths.double().mean()))
    assert metrics["dropped"] == pytest.approx(1 - len(learned) / len(whole))


def test_a_number_of_iterations_is_of_further_ones():
    env = batches.text_env()
    agent = batches.learner("rloo", env=env)
    assert [learn(agent, env, count).iterations_done for count in (2, 1)] == [2, 3]
    assert learn(agent, env).iterations_done == batches.SMALL["iterations"]


def test_the_first_step_is_adams_by_hand():
    """Its first moments cancel: ``lr g / (|g| + eps)``, with g clipped to the norm."""
    traj, settings = batches.text_batch(), {"learning_rate": 0.02, "adam_eps": 0.05, "max_grad_norm": 0.3}
    agent = batches.learner("rloo", iterations=4, **settings)
    agent.iterations_done = 1  # of four: three quarters of the rate are left
    start, found, step = batches.weights(agent.policy), {}, agent.optimizer.step
    agent.optimizer.step = lambda: found.update(batches.gradients(agent.policy)) or step()
    metrics = agent.update(traj)
    clipped = math.sqrt(sum(float((g**2).sum()) for g in found.values()))
    assert clipped == pytest.approx(0.3, rel=1e-5) and metrics["grad_norm"] > 0.3
    assert metrics["learning_rate"] == pytest.approx(0.015)
    for name, g in found.items():
        moved = dict(agent.policy.named_parameters())[name] - start[name]
        torch.testing.assert_close(moved, -0.015 * g / (g.abs() + 0.05), rtol=1e-5, atol=1e-9)


def test_the_rate_follows_a_budget_in_another_unit():
    agent = batches.learner("rloo", learning_rate=0.02, iterations=100)
    rates = []
    for agent.progress in (None, 0.0, 0.25, 1.0, 1.5):
        rates.append(agent.learning_rate)
    assert rates == pytest.approx([0.02, 0.02, 0.015, 0, 0])


@pytest.mark.parametrize("name", ["remax", "ppo-ptx", "iterated-rlhf"])
def test_a_restored_agent_has_counted_the_same(name):
    env = batches.env_for(name)
    agent = (
        batches.learner(name, env=env, iterations=4, rm_steps=4) if "rlhf" in name else batches.learner(name, env=env)
    )
    learn(agent, env, 1)
    twin = batches.learner(name, env=env)
    twin.restore(*agent.checkpoint())
    counts = {key: value for key, value in vars(agent).items() if key[0] != "_" and type(value) is int}
    assert counts == {key: vars(twin)[key] for key in counts}
    assert {"iterations_done", "episodes_done", "samples_done", "tokens_done", "steps_done"} < counts.keys()
    assert {"reward_calls", "comparisons_done", "trained_tokens"} < counts.keys() and agent.reward_calls >= 16
