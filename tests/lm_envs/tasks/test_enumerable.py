"""The enumerable task: its numbers, its tables, and that it is a text environment like the others."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch

import lm_envs
from lm_envs import tasks
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import TextMDP
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.model.forwards import response_logprob
from lm_envs.model.kv_cache import can_cache
from lm_envs.model.tokens import model_inputs
from lm_envs.tasks.enumerable import EnumerableConfig, PrefixTree, TableLM, TableLMConfig, encode_prompt, load

SMALL = dict(tokens=2, horizon=3, prompts=3)


def numbered(tokens, horizon):
    """Every text in the order that the numbers promise: by length, then lexicographically."""
    return [text for k in range(horizon + 1) for text in itertools.product(range(tokens), repeat=k)]


def test_the_promised_numbers_of_prefixes_and_sequences():
    tree = EnumerableConfig().tree
    assert (tree.prefixes, tree.sequences) == (781, 3906)
    stats = load().stats
    assert (stats["prefixes"], stats["sequences"]) == (781, 3906)
    assert {split: len(prompts) for split, prompts in load().prompts.items()} == {
        "train": 4,
        "validation": 4,
        "test": 4,
    }


@pytest.mark.parametrize("eos", [0, 1, 3])
def test_the_tree_numbers_every_text_once(eos):
    tree = PrefixTree(4, eos, 3)
    texts, ids = numbered(3, 3), [i for i in range(4) if i != eos]
    expected = [[ids[rank] for rank in text] for text in texts]
    assert [row[row >= 0].tolist() for row in tree.texts()] == expected
    responses = [row[row >= 0].tolist() for row in tree.responses()]
    assert responses == [text if len(text) == 3 else [*text, eos] for text in expected]
    assert len({tuple(r) for r in responses}) == tree.sequences == 40 and tree.prefixes == 13
    # By another way than it was made: the number of each sequence and of each of its prefixes.
    number = {tuple(text): i for i, text in enumerate(expected)}
    states = tree.states(tree.responses())
    for row, text in enumerate(expected):
        assert [number[tuple(text[:t])] for t in range(len(text) + 1)] == states[row, : len(text) + 1].tolist()
        assert states[row, -1] == row
    assert [tree.level(k) for k in range(4)] == [slice(0, 1), slice(1, 4), slice(4, 13), slice(13, 40)]


def test_a_tree_too_large_to_enumerate_is_refused():
    with pytest.raises(ValueError, match="make 11,111,111 sequences, more than the 2,000,000"):
        PrefixTree(11, 0, 7)
    with pytest.raises(ValueError, match="two tokens besides EOS"):
        PrefixTree(2, 0, 7)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        PrefixTree(4, 0, 0)


def given_tables(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, 7, 3)), rng.normal(size=(3, 15))


def test_tables_that_are_given_are_what_the_environment_plays():
    logits, rewards = given_tables()
    task = load(logits=logits, rewards=rewards, **SMALL, kl_coef=0.25)
    env = gymnasium.make_vec("lm_envs/Enumerable-v0", num_envs=1, task=task, group_size=1)
    texts = numbered(2, 3)
    for episode, text in enumerate(texts):
        obs, _ = env.reset(seed=episode)
        prompt = tasks_prompt(task, obs[0])
        actions = [*text] if len(text) == 3 else [*text, 2]
        total = 0.0
        for t, action in enumerate(actions):
            lm_envs.report(env, np.array([-0.5]))
            _, reward, terminated, _, infos = env.step(np.array([action]))
            row = logits[prompt, texts.index(text[:t])]
            reference = row[action] - np.log(np.exp(row).sum())
            expected = 0.25 * (reference + 0.5) + (rewards[prompt, episode] if terminated[0] else 0.0)
            assert reward[0] == pytest.approx(expected, abs=1e-12)
            total += reward[0]
        assert terminated[0]
        info = infos["final_info"]["lm"]
        assert info["finish_reason"][0] == ("length" if len(text) == 3 else "stop")
        assert info["response"][0] == "".join(f" {'ab'[i]}" for i in text)  # behind the prompt


def tasks_prompt(task, obs):
    width = task.prompt_length
    return task.prompts["train"].index(obs[:width].tolist())


@pytest.mark.parametrize("prompts, length", [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_prompts_are_distinct_and_of_one_length(prompts, length):
    config = EnumerableConfig(tokens=2, horizon=2, prompts=prompts)
    found = [encode_prompt(i, config) for i in range(prompts)]
    assert {len(prompt) for prompt in found} == {length} and len({tuple(p) for p in found}) == prompts
    task = load(tokens=2, horizon=2, prompts=prompts)
    assert len(set(task.reward._row)) == prompts


def test_padding_changes_no_logit_of_the_reference():
    """Law 4, for the table: unpadded, left-padded and right-padded rows agree, and what is no state is uniform."""
    model = load(**SMALL).reference
    text = torch.tensor([[0, 1, 1, 0]])  # a prompt of two digits, then two tokens
    plain = model(**model_inputs(text)).logits[:, 1:]
    left = torch.nn.functional.pad(text, (3, 0), value=-1)
    right = torch.nn.functional.pad(text, (0, 2), value=-1)
    assert torch.equal(model(**model_inputs(left)).logits[:, 4:], plain)
    assert torch.equal(model(**model_inputs(right)).logits[:, 1:4], plain)
    assert not bool(model(**model_inputs(left)).logits[:, :4].any())
    assert torch.equal(model(text, logits_to_keep=2).logits, plain[:, 1:])
    assert not torch.equal(plain[0, 0], plain[0, 1])
    # Behind EOS, behind the horizon, and after a prompt that there is not: no state.
    for row in ([0, 1, 2, 0], [0, 1, 1, 0, 0, 1], [1, 1, 0, 0]):
        logits = model(torch.tensor([row])).logits
        assert not bool(logits[0, -1].any()) and bool(torch.isfinite(logits).all())


def test_hidden_states_are_one_hot_so_that_a_linear_head_is_a_table():
    model = load(**SMALL).reference
    out = model(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]), output_hidden_states=True)
    assert out.hidden_states[-1][:, 1:].sum(dim=2).eq(1).all()
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits, rtol=0, atol=0)
    assert not can_cache(model)


def test_the_reference_saves_and_loads(tmp_path):
    model = load(**SMALL).reference
    model.save_pretrained(tmp_path)
    again = TableLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float64 and torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not bool(TableLM(TableLMConfig(tokens=2)).lm_head.weight.any())


def test_drawn_tables_are_standard_and_a_function_of_the_seed():
    task = load()
    logits = task.reference.lm_head.weight
    assert abs(float(logits.mean())) < 0.03 and abs(float(logits.std()) - 1) < 0.03
    table = task.reward.table
    assert 0.5 < table.std() < 2
    assert np.array_equal(load(seed=1).reward.table, table) and not np.array_equal(load(seed=2).reward.table, table)
    assert tasks.load("enumerable") is tasks.load("enumerable")
    # Mean 0, and among the responses to a prompt variance 1: by samples of the reference.
    env = TextVectorEnv(task, 1, kl_coef=0.0)
    traj = rollout(env, LMPolicy.for_mdp(env.mdp, task.reference), episodes=10_000, seed=3)
    prompt = torch.as_tensor(env.mdp.prompt_index(3, np.arange(10_000)))
    scores = [traj.score[prompt == x] for x in range(4)]
    assert abs(float(torch.stack([s.mean() for s in scores]).mean())) < 3 / 10_000**0.5
    assert abs(float(torch.stack([s.var() for s in scores]).mean()) - 1) < 0.06


def test_rewards_are_a_weight_per_token_plus_noise():
    """Least squares on token counts explains the most part, and not all."""
    task = load()
    tree = EnumerableConfig().tree
    counts = np.stack([(tree.responses() == token).sum(dim=1).numpy() for token in range(6)], axis=1).astype(float)
    design = np.column_stack([counts, np.ones(len(counts))])
    for table in task.reward.table:
        left = table - design @ np.linalg.lstsq(design, table, rcond=None)[0]
        assert 0.03 < left.var() / table.var() < 0.5


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("env_class, kind", [(TextVectorEnv, "mdp"), (TextBanditVectorEnv, "bandit")])
def test_law_2_bulk_path_is_step_path(rows, env_class, kind):
    options = dict(group_size=2, temperature=1.3, min_new_tokens=1, missing_eos=("subtract", 0.5))
    env = env_class(load(), rows, **options)
    policy = LMPolicy.for_mdp(env.mdp, load(seed=5).reference, bandit=kind == "bandit")
    bulk, stepped = (way(env, policy, episodes=40, seed=4) for way in (rollout, collect))
    assert bulk.response.tolist() == stepped.response.tolist()
    for name in ("logprob", "ref_logprob", "reward", "score"):
        torch.testing.assert_close(getattr(bulk, name), getattr(stepped, name), rtol=0, atol=1e-12)
    assert bulk.reward.abs().sum() > 0 and len(set(bulk.response_lengths.tolist())) > 3


def test_one_forward_for_all_is_the_tables_product():
    logits, rewards = given_tables()
    task = load(logits=logits, rewards=rewards, **SMALL)
    tree = PrefixTree(3, 2, 3)
    response = tree.responses()
    prompt = torch.tensor([encode_prompt(1, EnumerableConfig(**SMALL))]).expand(len(response), -1)
    found = response_logprob(task.reference, prompt, response, 2).sum(dim=1)
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-12)
    log_p = torch.as_tensor(logits[1]).log_softmax(dim=1)
    texts = numbered(2, 3)
    for number, text in enumerate(texts):
        actions = [*text] if len(text) == 3 else [*text, 2]
        by_hand = sum(float(log_p[texts.index(text[:t]), a]) for t, a in enumerate(actions))
        assert float(found[number]) == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(token=3), "enumerable has no option 'token': did you mean 'tokens'"),
        (dict(tokens=1), "tokens must be at least 2, not 1"),
        (dict(horizon=0), "horizon must be at least 1"),
        (dict(kl_coef=-1.0), "kl_coef must be at least 0"),
        (dict(tokens=9, horizon=9), "use fewer tokens or a shorter horizon"),
        (dict(logits=np.zeros((4, 7, 3))), r"logits must have shape \(4, 781, 6\) at these sizes, got \(4, 7, 3\)"),
        (dict(rewards=np.full((3, 15), np.nan), **SMALL), r"rewards must be finite, and \(0, 0\) holds nan"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_the_reward_refuses_what_it_has_no_entry_for():
    reward = load(**SMALL).reward
    with pytest.raises(ValueError, match="needs completion_ids: got 0 for 1 prompts"):
        reward(prompts=["a a"], completions=["a b"])
    with pytest.raises(ValueError, match="no prompt 'b b'; it has 'a a', 'a b', 'b a'"):
        reward(prompts=["a a", "b b"], completion_ids=[[2], [2]])
    with pytest.raises(ValueError, match="completion 0 has 4 tokens, more than the horizon 3"):
        reward(prompts=["a a"], completion_ids=[[0, 0, 0, 0]])
    with pytest.raises(ValueError, match="holds 4 tokens|longest prompt"):
        TextMDP(load(**SMALL), max_new_tokens=4)
