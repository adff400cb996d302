"""The network for other libraries: its shortcuts change no number, and its numbers are LMPolicy's."""

import copy

import gymnasium
import numpy as np
import pytest
import torch

import lm_envs
from lm_envs.algos.other_libraries.network import LMActorCritic, shared_texts
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.rollout import rollout
from lm_envs.env.single import TextEnv
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from tests import tiny

ROWS = 4


def network(env, seed=3):
    found = LMActorCritic.for_env(env)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.nn.init.normal_(found.policy.value_head.weight)
    return found


def played(env, net, steps=14):
    """Observations ``(steps, rows, L)`` of random play, and what the network said at each step."""
    rng = np.random.default_rng(0)
    obs, said = [env.reset(seed=0)[0]], []
    for _ in range(steps):
        with torch.no_grad():
            said.append(net(torch.as_tensor(obs[-1])))
        actions = rng.integers(1 if env.mdp.min_new_tokens else 0, env.mdp.vocab_size, size=env.num_envs)
        lm_envs.report(env, np.full(env.num_envs, -1.0))
        obs.append(env.step(actions)[0])
    logits, values = (torch.stack(x) for x in zip(*said, strict=True))
    return torch.as_tensor(np.stack(obs[:-1])), logits, values


def test_step_by_step_is_bulk_is_one_row_at_a_time():
    env = TextVectorEnv(tiny.task(temperature=0.7), ROWS)
    net = network(env)
    obs, logits, values = played(env, net)
    bulk_logits, bulk_values = net(obs)
    torch.testing.assert_close(bulk_logits, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(bulk_values, values, rtol=0, atol=1e-10)
    assert values.std() > 0.1  # negative control of the comparison: rows differ
    for row in obs.reshape(-1, obs.shape[-1])[::5]:
        kept = row[row >= 0][None]
        alone = net.model(input_ids=kept, output_hidden_states=True)
        one_logits, one_value = net(row)
        torch.testing.assert_close(one_logits, alone.logits[0, -1] / 0.7, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            one_value, net.policy.value_head(alone.hidden_states[-1][0, -1])[0], rtol=0, atol=1e-10
        )


def test_it_is_lm_policy():
    """The same log-probabilities, entropies and values as the policy that the library's own agents train."""
    env = TextVectorEnv(tiny.task(min_new_tokens=2), ROWS)
    net = network(env)
    policy = LMPolicy.for_mdp(env.mdp, net.model)
    policy.value_head = net.policy.value_head
    traj = rollout(env, policy, episodes=7, seed=1)
    now, mask = policy.evaluate(traj), traj.mask
    places, steps = env.mdp.prompt_length, mask.shape[1]
    prompt = torch.nn.functional.pad(traj.prompt, (places - traj.prompt.shape[1], 0), value=-1)
    response = torch.nn.functional.pad(traj.response, (0, env.mdp.max_new_tokens - steps), value=-1)
    states = torch.cat([prompt, response], dim=1).unsqueeze(1).repeat(1, steps, 1)
    for t in range(steps):
        states[:, t, places + t :] = -1
    logits, values = net(states)
    distribution = torch.distributions.Categorical(logits=logits[mask])
    torch.testing.assert_close(distribution.log_prob(traj.actions[mask]), now.logprob[mask], rtol=0, atol=1e-9)
    torch.testing.assert_close(values[mask], now.value[:, :-1][mask], rtol=0, atol=1e-9)
    entropy = -(distribution.probs * distribution.logits.clamp(min=-1e9)).sum(-1)
    torch.testing.assert_close(entropy, now.entropy[mask], rtol=0, atol=1e-9)
    assert (logits[:, :2][mask[:, :2]][..., tiny.EOS] == -torch.inf).all()


def test_the_cache_notices_an_update():
    env = TextVectorEnv(tiny.task(), ROWS)
    net = network(env)
    obs = torch.as_tensor(env.reset(seed=0)[0])
    with torch.no_grad():
        before = net(obs)[0]
        for parameter in net.model.parameters():
            parameter.mul_(1.5)
        after = net(obs)[0]
        fresh = copy.deepcopy(net.model)(**{"input_ids": obs[:1][obs[:1] >= 0][None]}).logits[0, -1]
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after[0], fresh, rtol=0, atol=1e-10)


def test_gradients_are_those_of_single_rows():
    env = TextVectorEnv(tiny.task(), ROWS)
    net = network(env)
    obs, _, _ = played(env, net, steps=6)
    rows = obs.reshape(-1, obs.shape[-1])
    weight = torch.linspace(-1, 1, len(rows), dtype=torch.float64)

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    def loss(states, weights):
        logits, values = net(states)
        return (weights * (logits.log_softmax(-1)[:, 3] + values)).sum()

    alone = sum(gradient(loss(rows[i : i + 1], weight[i : i + 1])) for i in range(len(rows)))
    torch.testing.assert_close(gradient(loss(rows, weight)), alone, rtol=1e-8, atol=1e-10)


def test_shared_texts_by_hand():
    obs = np.array(
        [
            [-1, 5, 7, -1],  # begins the next
            [-1, 5, 7, 2],
            [-1, 5, -1, -1],  # begins both above
            [4, 5, 7, -1],  # another prompt, though it ends the same
            [-1, 5, 7, 2],  # once more
            [-1, 5, 8, -1],  # begins none
        ]
    )
    texts, index = shared_texts(obs, 2)
    assert sorted(texts.tolist()) == [[-1, 5, 7, 2], [-1, 5, 8, -1], [4, 5, 7, -1]]
    assert texts[index].tolist() == [
        [-1, 5, 7, 2],
        [-1, 5, 7, 2],
        texts[index[2]].tolist(),
        [4, 5, 7, -1],
        [-1, 5, 7, 2],
        [-1, 5, 8, -1],
    ]
    assert texts[index[2]].tolist() in ([-1, 5, 7, 2], [-1, 5, 8, -1])


@pytest.mark.parametrize("vocabulary", [3, 300])  # 300 takes two bytes
def test_shared_texts_hold_every_state_in_as_few_texts_as_there_can_be(vocabulary):
    generator = np.random.default_rng(vocabulary)
    obs = np.full((200, 8), -1)
    obs[:, 1] = generator.integers(0, 2, 200)
    lengths = generator.integers(0, 6, 200)
    for row, length in enumerate(lengths):
        obs[row, 2 : 2 + length] = generator.choice([0, 1, vocabulary - 1], length)
    texts, row = shared_texts(obs, 2)
    states = [tuple(text[: 2 + length]) for text, length in zip(obs.tolist(), lengths, strict=True)]
    assert [tuple(texts[row[i]][: len(state)]) for i, state in enumerate(states)] == states
    leaves = {text for text in states if not any(o != text and o[: len(text)] == text for o in states)}
    assert {tuple(t for i, t in enumerate(text) if i < 2 or t >= 0) for text in texts.tolist()} == leaves
    assert len(texts) == len(leaves)


def test_a_longer_prompt_is_another_text():
    obs = np.array([[-1, 5, 7, -1], [4, 5, 7, -1], [4, 5, 7, 2]])
    texts, index = shared_texts(obs, 3)
    assert texts[index].tolist() == [[-1, 5, 7, -1], [4, 5, 7, 2], [4, 5, 7, 2]]


def test_whole_episodes_cost_a_forward_each():
    """Four rows of fourteen steps, of which each text is computed once."""
    env = TextVectorEnv(tiny.task(), ROWS)
    net = network(env)
    obs, _, _ = played(env, net)
    sizes = []
    net.model.register_forward_pre_hook(
        lambda _, args, given: sizes.append(given["input_ids"].shape[0]), with_kwargs=True
    )
    net(obs)
    ended = int((obs[1:] < 0).sum(-1).gt((obs[:-1] < 0).sum(-1)).sum())
    assert len(sizes) == 1 and ROWS <= sizes[0] <= ROWS + ended < obs.shape[0] * ROWS / 2


@pytest.mark.parametrize("wrap", ["native", "sync", "single"])
def test_for_env_finds_what_is_played(wrap):
    task = tiny.task()
    env = {
        "native": lambda: TextVectorEnv(task, ROWS),
        "sync": lambda: gymnasium.vector.SyncVectorEnv([lambda: TextEnv(task)] * ROWS),
        "single": lambda: gymnasium.wrappers.RecordEpisodeStatistics(TextEnv(task)),
    }[wrap]()
    net = LMActorCritic.for_env(env)
    assert net.num_envs == (1 if wrap == "single" else ROWS)
    assert all(p.requires_grad for p in net.parameters()) and not task.reference.lm_head.weight.requires_grad
    logits, value = net(torch.as_tensor(env.reset(seed=0)[0]))
    assert logits.shape[-1] == len(tiny.WORDS) and (value == 0).all()


def test_what_it_refuses():
    with pytest.raises(TypeError, match="no text environment"):
        LMActorCritic.for_env(gymnasium.make("CartPole-v1"))
    with pytest.raises(ValueError, match="Bandit-v0"):
        LMActorCritic.for_env(TextBanditVectorEnv(tiny.task(), 2))
    with pytest.raises(ValueError, match="one vocabulary"):
        LMActorCritic.for_env(TextVectorEnv(tiny.task(), 2), tiny.gpt2(vocab=12))


def test_dropout_stays_off():
    env = TextVectorEnv(tiny.task(), ROWS)
    model = tiny.gpt2()
    model.config.attn_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    net = LMActorCritic.for_env(env, model).train()
    obs = torch.as_tensor(env.reset(seed=0)[0])
    assert net.training and torch.equal(net(obs)[0], net(obs)[0])
    net.model.train()  # negative control: dropout would show
    assert not torch.equal(net(obs)[0], net(obs)[0])
