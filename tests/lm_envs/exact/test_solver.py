"""The exact solver against brute force of another kind, its identities, and samples."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lm_envs.algos.best_of_n import BestOfN, kl_bound
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import TextMDP
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.exact.solver import Exact, cosine, relative_bias
from lm_envs.tasks.enumerable import load
from tests import tiny

OPTIONS = dict(temperature=1.4, min_new_tokens=1, missing_eos=("subtract", 0.8))


@pytest.fixture(scope="module")
def exact():
    return Exact(TextMDP(load()))


@pytest.fixture(scope="module")
def masked():
    """A small one with every option of the environment that changes probabilities or scores."""
    return Exact(TextMDP(load(tokens=3, horizon=3, prompts=2), **OPTIONS))


def policy_table(solver, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(solver.log_ref.shape, generator=generator, dtype=torch.float64)
    return (solver.log_ref + scale * noise).log_softmax(dim=2)


def by_brute_force(mdp):
    """Prompts x responses with reference probability and score, from the model and the reward, one token at a time."""
    found = []
    eos, horizon = mdp.eos_token_id, mdp.max_new_tokens
    tokens = [i for i in range(mdp.vocab_size) if i != eos]
    texts = [text for k in range(horizon + 1) for text in itertools.product(tokens, repeat=k)]
    for prompt in mdp.prompts:
        row = {}
        for text in texts:
            response = [*text] if len(text) == horizon else [*text, eos]
            probability = 1.0
            for t, token in enumerate(response):
                logits = mdp.reference(torch.tensor([[*prompt, *response[:t]]])).logits[0, -1] / mdp.temperature
                weights = logits.exp().tolist()
                if t < mdp.min_new_tokens:
                    weights[eos] = 0.0
                probability *= weights[token] / sum(weights)
            score = mdp.task.reward(
                prompts=[mdp.task.tokenizer.decode(prompt)],
                completions=[mdp.task.tokenizer.decode(list(text))],
                completion_ids=[response],
            )[0]
            if mdp.missing_eos and len(text) == horizon:
                score -= mdp.missing_eos[1]
            row[text] = (probability, float(score))
        found.append(row)
    return texts, found


def small_mdps():
    return [
        TextMDP(load(tokens=2, horizon=3, prompts=3)),
        TextMDP(load(tokens=3, horizon=3, prompts=2), **OPTIONS),
        TextMDP(tiny.task(), max_new_tokens=2, kl_coef=0.4),  # any small text environment, here a GPT-2's
    ]


@pytest.mark.parametrize("number", range(3))
def test_the_optimum_is_that_of_brute_force(number):
    """Z, pi* and J* from sums over whole responses; conditionals by adding up all that begins with a prefix."""
    mdp = small_mdps()[number]
    solver, beta = Exact(mdp), mdp.kl_coef
    texts, found = by_brute_force(mdp)
    optimal = solver.optimal_policy
    total = 0.0
    for x, row in enumerate(found):
        weights = {text: p * math.exp(r / beta) for text, (p, r) in row.items()}
        partition = sum(weights.values())
        total += beta * math.log(partition) / len(found)
        log_ref = solver.sequences(solver.log_ref)[x].exp().tolist()
        for y, text in enumerate(texts):
            assert log_ref[y] == pytest.approx(row[text][0], abs=1e-12)
            assert float(solver.score[x, y]) == pytest.approx(row[text][1], abs=1e-12) or row[text][0] == 0
            assert float(solver.sequences(optimal)[x, y].exp()) == pytest.approx(weights[text] / partition, abs=1e-12)
        ranks = {token: i for i, token in enumerate(solver.tree.tokens.tolist())}
        for s, prefix in enumerate(t for t in texts if len(t) < mdp.max_new_tokens):
            mass = sum(w for text, w in weights.items() if text[: len(prefix)] == prefix)
            if mass == 0:
                continue
            for token in ranks:
                longer = (*prefix, token)
                share = sum(w for text, w in weights.items() if text[: len(longer)] == longer) / mass
                assert float(optimal[x, s, token].exp()) == pytest.approx(share, abs=1e-12)
            reached = sum(p for text, (p, _) in row.items() if text[: len(prefix)] == prefix)
            assert float(solver.soft_value[x, s]) == pytest.approx(beta * math.log(mass / reached), abs=1e-10)
    assert float(solver.optimal_value) == pytest.approx(total, abs=1e-12)


def test_probabilities_sum_to_one_under_every_table(exact, masked):
    for solver in (exact, masked):
        for table in (solver.log_ref, solver.optimal_policy, policy_table(solver, 1)):
            torch.testing.assert_close(table.exp().sum(dim=2), torch.ones(table.shape[:2], dtype=torch.float64))
            total = solver.sequences(table).exp().sum(dim=1)
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
        assert float(solver.visits(solver.log_ref)[:, 0].sum()) == len(solver.prompts)


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_to_the_optimum_is_beta_times_kl(exact, masked, seed):
    """Law 6, to 1e-10 for random policies near and far."""
    for solver in (exact, masked):
        table = policy_table(solver, seed, scale=0.2 + seed)
        gap = float(solver.optimal_value - solver.objective(table))
        kl = float(solver.kl(table, solver.optimal_policy))
        assert gap == pytest.approx(solver.kl_coef * kl, abs=1e-10) and gap > 1e-3
        assert float(solver.objective(solver.optimal_policy)) == pytest.approx(float(solver.optimal_value), abs=1e-12)
        assert solver.regret(table) == pytest.approx(
            solver.kl_coef * kl / float(solver.optimal_value - solver.reference_value), abs=1e-10
        )
        # Negative control: another coefficient is another optimum.
        other = Exact(solver.mdp, kl_coef=solver.kl_coef * 1.1)
        assert abs(gap - solver.kl_coef * float(solver.kl(table, other.optimal_policy))) > 1e-4


def test_regret_is_zero_at_the_optimum_and_one_at_the_reference(exact):
    assert abs(exact.regret(exact.optimal_policy)) < 1e-12
    assert exact.regret(exact.mdp.reference) == pytest.approx(1, abs=1e-12)


def test_without_a_penalty_the_optimum_is_the_best_response():
    solver = Exact(TextMDP(load(tokens=2, horizon=3, prompts=3), kl_coef=0.0))
    assert float(solver.optimal_value) == pytest.approx(float(solver.score.amax(dim=1).mean()), abs=1e-12)
    assert float(solver.reward(solver.optimal_policy)) == pytest.approx(float(solver.optimal_value), abs=1e-12)


def test_without_a_penalty_the_optimum_writes_nothing_that_is_forbidden():
    """The shortest text is the best, and the environment does not let it end there."""
    task = replace(tiny.task(), reward=lambda prompts, completions, **columns: [-float(len(c)) for c in completions])
    solver = Exact(TextMDP(task, max_new_tokens=2, min_new_tokens=1, kl_coef=0.0))
    possible = solver.score.masked_fill(solver.sequences(solver.log_ref) == -math.inf, -math.inf).amax(dim=1)
    assert (possible < solver.score.amax(dim=1)).all()
    assert float(solver.optimal_value) == pytest.approx(float(possible.mean()), abs=1e-12)
    assert float(solver.reward(solver.optimal_policy)) == pytest.approx(float(possible.mean()), abs=1e-12)


def test_values_are_those_of_the_rewards_that_the_environment_pays(exact):
    """V^pi and Q^pi by stepping: sampled returns average to them, and the root's is J."""
    table = policy_table(exact, 3)
    value, q = exact.values(table)
    assert float(value[:, 0].mean()) == pytest.approx(float(exact.objective(table)), abs=1e-12)
    torch.testing.assert_close((table.exp() * q).sum(dim=2), value, rtol=0, atol=1e-12)
    traj, weight = exact.trajectories(table)
    returns = traj.reward.flip(1).cumsum(dim=1).flip(1)  # no reward beyond an end
    for prefix in (0, 3, 17, 400):
        here = (exact.states.repeat(4, 1) == prefix) & traj.mask & (traj.group == 2).unsqueeze(1)
        mean = (weight.unsqueeze(1) * returns)[here].sum() / weight.unsqueeze(1).expand_as(here)[here].sum()
        assert float(mean) == pytest.approx(float(value[2, prefix]), abs=1e-10)
    # The soft ones are those of the optimal policy, whose Q adds the action's own penalty.
    torch.testing.assert_close(exact.values(exact.optimal_policy)[0], exact.soft_value, rtol=0, atol=1e-12)


def test_value_error_is_zero_for_exact_values_and_weighs_by_visits(exact):
    table = policy_table(exact, 3)
    value = exact.values(table)[0]
    assert exact.value_error(value, table) == 0
    assert exact.value_error(value + 0.5, table) == pytest.approx(0.25)
    one = value.clone()
    one[:, 0] += 1.0  # the root is one of the E[length] prefixes of an episode
    assert exact.value_error(one, table) == pytest.approx(4 / float(exact.visits(table).sum()))


def test_the_gradient_is_that_of_finite_differences():
    solver = Exact(TextMDP(load(tokens=2, horizon=2, prompts=2)))
    model = load(tokens=2, horizon=2, prompts=2, seed=5).reference.requires_grad_(True)
    policy = LMPolicy.for_mdp(solver.mdp, model)
    found = solver.gradient(policy)
    assert set(found) == {"model.lm_head.weight"}  # the critic has no part in J
    weight, step = model.lm_head.weight, 1e-6
    for place in [(0, 0), (1, 2), (2, 5)]:
        with torch.no_grad():
            weight[place] += step
            above = float(solver.objective(policy))
            weight[place] -= 2 * step
            below = float(solver.objective(policy))
            weight[place] += step
        assert float(found["model.lm_head.weight"][place]) == pytest.approx((above - below) / (2 * step), abs=1e-8)
    other = {name: 2 * g for name, g in found.items()}
    assert cosine(other, found) == pytest.approx(1) and relative_bias(other, found) == pytest.approx(1)


def test_any_kind_of_policy_gives_the_same_table(exact):
    model = load(seed=7).reference
    table = exact.table(model)
    for policy in (LMPolicy.for_mdp(exact.mdp, model), LMPolicy.for_mdp(exact.mdp, model, bandit=True), table):
        torch.testing.assert_close(exact.table(policy), table, rtol=0, atol=1e-14)
    small = Exact(exact.mdp, batch_size=37)
    torch.testing.assert_close(small.table(model), table, rtol=0, atol=1e-14)
    single = tiny.gpt2(seed=3, vocab=6, dtype=torch.float32)
    total = exact.sequences(single).exp().sum(dim=1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_wrong_shapes_and_dense_rewards_are_refused(exact):
    with pytest.raises(ValueError, match=r"expected a table \(X, S, V\) = \(4, 781, 6\), got shape"):
        exact.table(torch.zeros(4, 780, 6))
    with pytest.raises(ValueError, match="expected a table"):
        exact.table(exact.sequences(exact.log_ref))
    with pytest.raises(ValueError, match=r"expected \(X, L\) = \(4, 3906\)"):
        exact.sequences(torch.zeros(4, 3905))
    with pytest.raises(ValueError, match="n of at least 1"):
        exact.best_of_n(exact.log_ref, 0)

    def dense(completion_ids):
        return [[0.0] * len(ids) for ids in completion_ids]

    dense.dense = True
    with pytest.raises(ValueError, match="reward per response"):
        Exact(TextMDP(tiny.task(reward=dense), max_new_tokens=2))


# Best-of-n


def tied():
    """Scores with many ties: rounded to halves."""
    task = load(tokens=3, horizon=3, prompts=2)
    return Exact(TextMDP(load(tokens=3, horizon=3, prompts=2, rewards=(task.reward.table * 2).round() / 2)))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_is_that_of_every_tuple_of_samples(n):
    """By going through all n-tuples, ties to the earliest."""
    solver = tied()
    p = solver.sequences(solver.log_ref).exp()
    assert len(solver.score[0].unique()) < 20 < len(solver.score[0])
    for x in range(2):
        expected = torch.zeros_like(p[x])
        grids = torch.cartesian_prod(*[torch.arange(len(p[x]))] * n).reshape(-1, n)
        order = (solver.score[x][grids] == solver.score[x][grids].amax(dim=1, keepdim=True)).int().argmax(dim=1)
        best = grids.gather(1, order.unsqueeze(1)).squeeze(1)
        expected.index_add_(0, best, p[x][grids].prod(dim=1))
        torch.testing.assert_close(solver.best_of_n(solver.log_ref, n)[x].exp(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_soft_best_of_n_is_that_of_every_tuple_of_samples(n):
    solver, temperature = tied(), 0.4
    p = solver.sequences(solver.log_ref).exp()
    found = solver.best_of_n(solver.log_ref, n, temperature).exp()
    for x in range(2):
        expected = torch.zeros_like(p[x])
        grids = torch.cartesian_prod(*[torch.arange(len(p[x]))] * n).reshape(-1, n)
        share = (solver.score[x][grids] / temperature).softmax(dim=1) * p[x][grids].prod(dim=1, keepdim=True)
        expected.index_add_(0, grids.flatten(), share.flatten())
        torch.testing.assert_close(found[x], expected, rtol=0, atol=1e-12)


def test_soft_best_of_n_lies_between_the_policy_best_of_n_and_the_optimum():
    solver = tied()
    log_ref, best = solver.sequences(solver.log_ref), solver.best_of_n(solver.log_ref, 4)
    torch.testing.assert_close(solver.best_of_n(solver.log_ref, 4, 1e6), log_ref, rtol=0, atol=1e-5)
    torch.testing.assert_close(solver.best_of_n(solver.log_ref, 4, 1e-3).exp(), best.exp(), rtol=0, atol=1e-9)
    beta = solver.kl_coef
    gaps = [float(solver.kl(solver.best_of_n(solver.log_ref, n, beta), solver.tilted(beta))) for n in (4, 64, 4096)]
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2]


@pytest.mark.parametrize("n", [2, 16, 256])
def test_kl_of_best_of_n_stays_under_its_bound(exact, n):
    table = policy_table(exact, 2)
    best = exact.best_of_n(table, n)
    assert float(best.exp().sum()) == pytest.approx(4, abs=1e-10)
    kl = float(exact.kl(best, table))
    assert 0 < kl <= kl_bound(n)
    if n == 2:
        assert kl > 0.85 * kl_bound(n)  # so the bound is nearly met where responses are many
        # Ties take KL away: of the same scores, rounded.
        plain = Exact(TextMDP(load(tokens=3, horizon=3, prompts=2)))
        few = tied()
        assert float(few.kl(few.best_of_n(few.log_ref, 2))) < float(plain.kl(plain.best_of_n(plain.log_ref, 2))) - 1e-4


@pytest.mark.slow
def test_best_of_n_of_the_library_is_distributed_so():
    """100,000 samples: score, win-rate and KL within three standard errors of the exact ones, and not of another n."""
    task, count, n = load(), 100_000, 4
    env = TextVectorEnv(task, 1)
    solver = Exact(env.mdp)
    policy = LMPolicy.for_mdp(env.mdp, task.reference)
    traj = rollout(env, BestOfN(policy, env.mdp, n), episodes=count, seed=1)
    base = rollout(env, policy, episodes=count, seed=1 << 20)
    prompt = torch.as_tensor(env.mdp.prompt_index(1, torch.arange(count).numpy()))
    number = solver.tree.states(traj.response)[:, -1]
    log_ratio = (solver.best_of_n(solver.log_ref, n) - solver.sequences(solver.log_ref))[prompt, number]
    # A win against the reference's sample for the same prompt: exact given the response, so only one side is sampled.
    upto = solver._distribution(solver.sequences(solver.log_ref).exp())
    wins = ((upto[0] + upto[1]) / 2)[prompt, number]
    assert not torch.equal(base.response, traj.response)

    def within(values, expected):
        return abs(float(values.mean()) - expected) / (float(values.std()) / count**0.5)

    best = {k: solver.best_of_n(solver.log_ref, k) for k in (n, n + 1)}
    assert within(traj.score, float(solver.reward(best[n]))) < 3
    assert within(wins, solver.win_rate(best[n], solver.log_ref)) < 3
    assert within(log_ratio, float(solver.kl(best[n]))) < 3
    assert within(traj.score, float(solver.reward(best[n + 1]))) > 10
    assert within(wins, solver.win_rate(best[n + 1], solver.log_ref)) > 10
    assert within(log_ratio, float(solver.kl(best[n + 1]))) > 10


def test_win_rate_against_itself_is_one_half_and_ties_count_half():
    solver = tied()
    assert solver.win_rate(solver.log_ref, solver.log_ref) == pytest.approx(0.5, abs=1e-12)
    a, b = policy_table(solver, 1), policy_table(solver, 2)
    assert solver.win_rate(a, b) + solver.win_rate(b, a) == pytest.approx(1, abs=1e-12)
    p, q, r = solver.sequences(a).exp(), solver.sequences(b).exp(), solver.score
    pairs = (torch.sign(r.unsqueeze(2) - r.unsqueeze(1)) + 1) / 2
    assert solver.win_rate(a, b) == pytest.approx(float(torch.einsum("xi,xj,xij->x", p, q, pairs).mean()), abs=1e-12)


# The frontier


def test_the_frontier_goes_through_the_optimum_and_no_policy_is_beyond_it(exact):
    optimum = exact.sequences(exact.optimal_policy)
    kl, reward = exact.frontier([10.0, exact.kl_coef, 0.01])
    torch.testing.assert_close(exact.tilted(exact.kl_coef), optimum, rtol=0, atol=1e-10)
    assert float(kl[1]) == pytest.approx(float(exact.kl(optimum)), abs=1e-10)
    assert kl.tolist() == sorted(kl.tolist()) and reward.tolist() == sorted(reward.tolist())
    for k, r in zip(kl.tolist(), reward.tolist(), strict=True):
        assert exact.frontier_reward(k) == pytest.approx(r, abs=1e-8)
    assert abs(exact.frontier_gap(exact.optimal_policy)) < 1e-9
    assert abs(exact.frontier_gap(exact.log_ref)) < 1e-12
    for seed in range(4):
        assert exact.frontier_gap(policy_table(exact, seed, 0.5)) > 1e-2
    for n in (2, 8, 64):
        assert exact.frontier_gap(exact.best_of_n(exact.log_ref, n)) > 1e-3


def test_the_ends_of_the_frontier(exact):
    best = float(exact.score.amax(dim=1).mean())
    assert exact.frontier_reward(100.0) == best
    assert exact.frontier_reward(0.0) == pytest.approx(float(exact.reference_value))
    # Near the reference R* = R_ref + sqrt(2 KL Var(r)), the variance within prompts.
    p = exact.sequences(exact.log_ref).exp()
    mean = (p * exact.score).sum(dim=1, keepdim=True)
    variance = float((p * (exact.score - mean) ** 2).sum(dim=1).mean())
    assert exact.frontier_reward(1e-4) == pytest.approx((2e-4 * variance) ** 0.5, rel=0.02)
    limit = float(-exact.sequences(exact.log_ref).gather(1, exact.score.argmax(dim=1, keepdim=True)).mean())
    assert exact.frontier_reward(limit - 1e-3) == pytest.approx(best, abs=1e-3)


# Trajectories


def test_enumerated_episodes_are_those_that_the_environment_plays(masked):
    """Every row as the environment pays it, and frequencies as the weights say."""
    env = TextVectorEnv(masked.mdp.task, 8, **OPTIONS)
    policy = LMPolicy.for_mdp(env.mdp, load(tokens=3, horizon=3, prompts=2, seed=3).reference)
    traj, weight = masked.trajectories(policy)
    assert float(weight.sum()) == pytest.approx(1, abs=1e-12) and bool((traj.response[:, 0] != 3).all())
    sampled = collect(env, policy, episodes=400, seed=2)
    row = {tuple(obs): i for i, obs in enumerate(traj.obs.tolist())}
    for name in ("logprob", "ref_logprob", "reward"):
        mine = torch.stack([getattr(traj, name)[row[tuple(obs)]] for obs in sampled.obs.tolist()])
        torch.testing.assert_close(mine, getattr(sampled, name), rtol=0, atol=1e-12)
    many = rollout(env, policy, episodes=50_000, seed=2)
    counts = torch.zeros(len(traj))
    for obs in many.obs.tolist():
        counts[row[tuple(obs)]] += 1
    expected = weight * 50_000
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < len(traj) + 4 * (2 * len(traj)) ** 0.5


def test_enumerated_episodes_know_their_prompts(masked):
    traj, _ = masked.trajectories(masked.log_ref)
    for prompt, index, group in zip(traj.prompt, traj.prompt_index.tolist(), traj.group.tolist(), strict=True):
        assert prompt[prompt >= 0].tolist() == list(masked.mdp.prompts[index]) and group == index
    assert set(traj.prompt_index.tolist()) == {0, 1}


def test_a_critic_s_values_are_those_of_their_prefixes(masked):
    class Critic:
        def evaluate(self, traj):
            """The value before each token tells the prompt and the tokens so far."""
            weight = torch.tensor([7.0**t for t in range(traj.response.shape[1])], dtype=torch.float64)
            said = ((traj.response + 1) * weight).cumsum(dim=1)
            value = torch.cat([torch.zeros(len(said), 1, dtype=torch.float64), said], dim=1)
            return SimpleNamespace(value=value + 1e4 * traj.prompt.clamp(min=0).sum(dim=1, keepdim=True))

    found, texts = masked.values_of(Critic()), masked.tree.texts()
    for x, prompt in enumerate(masked.mdp.prompts):
        for s, text in enumerate(texts[: masked.tree.prefixes].tolist()):
            said = sum((token + 1) * 7.0**t for t, token in enumerate(text) if token >= 0)
            assert float(found[x, s]) == 1e4 * sum(prompt) + said


def test_gradients_are_compared_over_the_parameters_of_the_second():
    found = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([100.0])}
    exact = {"a": torch.tensor([4.0, 3.0])}
    assert cosine(found, exact) == pytest.approx(0.8)
    assert relative_bias(found, exact) == pytest.approx(math.hypot(1, 3) / 5)
