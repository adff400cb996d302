"""Data on disk teach what the same data in memory teach."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from lm_envs.algos.dpo import DPO, DPOConfig
from lm_envs.algos.engine.comparisons import Comparisons
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.reward_modelling import RewardModelling, RewardModellingConfig, Scores
from lm_envs.algos.sft import SFT, SFTConfig
from lm_envs.data.dataset import Examples
from lm_envs.data.packed import PackedExamples, pack, tokenise
from lm_envs.model.text import Codec
from lm_envs.training import stream
from lm_envs.trajectories import from_responses
from tests.lm_envs import byo


@pytest.fixture(scope="module")
def tokenizer():
    return byo.byte_level_bpe()


@pytest.fixture
def packed(tokenizer, tmp_path) -> PackedExamples:
    rows = [
        {"prompt": text[: 5 + i], "completions": [" a fish .", " hid", " saw"][:k], "ranks": [1, 0, 2][:k]}
        for i, text in enumerate(byo.TEXTS)
        for k in [2 + i % 2]
    ]
    data = Examples(byo.write_jsonl(tmp_path / "p.jsonl", rows))
    pack(tokenise(data, Codec(tokenizer), data.rejected), tmp_path / "packed", dict)
    return PackedExamples(tmp_path / "packed", preferences=True)


def in_memory(packed: PackedExamples):
    prompts, responses = zip(*map(packed.read, range(len(packed))), strict=True)
    traj = from_responses(prompts, responses, max(map(len, prompts)), packed.column("group").tolist())
    traj.rank = torch.from_numpy(packed.column("rank").copy())
    return traj


def policy(tokenizer) -> LMPolicy:
    return LMPolicy(byo.llama(len(tokenizer)), tokenizer.eos_token_id, 24, 12)


def weights(agent) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


def learned(agent, iterations: int = 3) -> torch.Tensor:
    for _ in range(iterations):
        agent.iteration()
    return weights(agent)


def test_rows_are_those_of_memory(packed):
    stored, memory = packed, in_memory(packed)
    index = torch.tensor([5, 0, 17])
    mine, theirs = stored.select(index), memory.select(index).trim(prompt=True)
    for name in ("actions", "mask", "prompt", "response", "obs", "group", "rank", "terminated"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert stored.longest == (int((memory.prompt >= 0).sum(1).max()), int(memory.lengths.max()))
    for index in itertools.islice(stream(len(Comparisons("x", stored)), 4, 0), 4):
        mine, theirs = (Comparisons("x", data).select(torch.from_numpy(index)) for data in (stored, memory))
        assert torch.equal(mine.group, theirs.group) and torch.equal(mine.rank, theirs.rank)
        assert torch.equal(mine.response, theirs.trim().response)


def test_sft_learns_the_same(packed, tokenizer):
    ends = []
    for data in (PackedExamples(packed.folder), in_memory(packed)):
        ends.append(learned(SFT(policy(tokenizer), SFTConfig(episodes=8), data)))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(ends[0], weights(SFT(policy(tokenizer), None, in_memory(packed))), atol=1e-5)


def test_dpo_learns_the_same_and_keeps_its_reference_on_disk(packed, tokenizer):
    config = DPOConfig(episodes=4, micro_batch=5)
    stored = DPO(policy(tokenizer), config, packed)
    memory = DPO(policy(tokenizer), config, in_memory(packed))
    reference = memory.data.data
    index = torch.tensor([3, 20, 1])
    found, expected = stored.data.data.select(index), reference.select(index).trim(prompt=True)
    torch.testing.assert_close(found.ref_logprob, torch.where(expected.mask, expected.ref_logprob, 0.0))
    torch.testing.assert_close(learned(stored), learned(memory), atol=1e-6, rtol=1e-5)
    assert "extra.ref_logprob" not in stored.checkpoint()[0] and "extra.ref_logprob" in memory.checkpoint()[0]


def test_kto_learns_the_same_from_labels_on_disk(tokenizer, tmp_path):
    rows = [
        {"prompt": text[: 5 + i], "completion": [" a fish .", " hid"][i % 2], "label": i % 3 == 0}
        for i, text in enumerate(byo.TEXTS)
    ]
    data = Examples(byo.write_jsonl(tmp_path / "l.jsonl", rows), "judgments")
    pack(tokenise(data, Codec(tokenizer), data.rejected), tmp_path / "labels", dict)
    packed = PackedExamples(tmp_path / "labels", preferences=True, mismatched=True)
    plain = PackedExamples(tmp_path / "labels", preferences=True)
    config = DPOConfig(loss="kto", episodes=4, micro_batch=3)
    stored, memory = DPO(policy(tokenizer), config, packed), DPO(policy(tokenizer), config, in_memory(plain))
    assert plain.rank.tolist() == [int(i % 3 != 0) for i in range(len(rows))]
    index = torch.tensor([2, 0])
    mine, theirs = stored.data.select(index), memory.data.select(index).trim(prompt=True)
    for name in ("prompt", "response", "rank"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert torch.equal(mine.response[2:], plain.select((index + len(rows) // 2) % len(rows)).response)
    torch.testing.assert_close(mine.ref_logprob, torch.where(theirs.mask, theirs.ref_logprob, 0.0))
    torch.testing.assert_close(learned(stored), learned(memory), atol=1e-6, rtol=1e-5)
    train, held = packed.divide(0.3)
    for part in (train, held):  # a prompt and its mismatched row stay together
        half = len(part) // 2
        assert (part.column("share")[:half] == part.column("share")[half:]).all() and (part.rank[half:] == -1).all()


def test_a_stored_reference_without_the_mismatched_rows_is_not_taken_for_them(packed):
    def one(traj):
        return traj.mask.float()

    PackedExamples(packed.folder).keep_reference("k", one)
    PackedExamples(packed.folder).keep_reference("k")  # it is there
    more = PackedExamples(packed.folder, preferences=True, mismatched=True)
    with pytest.raises(ValueError, match="missing or damaged"):
        more.keep_reference("k")
    more.keep_reference("k", one)
    last = more.select(torch.tensor([len(more) - 1]))
    assert torch.equal(last.ref_logprob, last.mask.float())


def test_the_reference_is_the_policy_as_it_started_when_training_goes_on(packed, tokenizer):
    def data():
        return PackedExamples(packed.folder, preferences=True)

    config = DPOConfig(episodes=4, learning_rate=1e-2)
    whole = learned(DPO(policy(tokenizer), config, data()), 4)
    first = DPO(policy(tokenizer), config, data())
    learned(first, 2)
    state = copy.deepcopy(first.checkpoint())
    moved = DPO(first.policy, config, data())  # made with weights that have moved: the file says what the start was
    moved.restore(*state)
    assert torch.equal(learned(moved, 2), whole)


@pytest.mark.parametrize("ranking", ["pairs", "plackett-luce", "dpo"])
def test_a_row_s_loss_is_multiplied_by_its_weight(tokenizer, tmp_path, ranking):
    counts = [0.0, 0.25, 1.0, 3.0]
    rows = [
        {"prompt": text[:5], "completions": [" a fish .", " hid", " saw"], "ranks": [1, 0, 2], "trust": str(weight)}
        for text, weight in zip(byo.TEXTS, counts, strict=False)
    ]
    data = Examples(byo.write_jsonl(tmp_path / "p.jsonl", rows))
    pack(tokenise(data, Codec(tokenizer), data.rejected, weight="trust"), tmp_path / "packed", dict)
    packed = PackedExamples(tmp_path / "packed", preferences=True)
    if ranking == "dpo":
        agent = DPO(policy(tokenizer), DPOConfig(beta=0.7), packed)
        evaluate = agent.policy.evaluate
        with torch.no_grad():  # away from the reference
            agent.policy.model.lm_head.weight *= 1.5
    else:
        agent = RewardModelling(policy(tokenizer), RewardModellingConfig(ranking=ranking), packed)
        evaluate = lambda traj: Scores(traj.response.double().mean(dim=1))  # noqa: E731

    def loss(traj):
        return agent.loss(traj, evaluate(traj), {})[0].item()

    whole, parts = packed.select(slice(0, 12)), [packed.select(slice(3 * k, 3 * k + 3)) for k in range(4)]
    for part in parts:
        part.weight = None
    assert whole.weight.tolist() == [weight for weight in counts for _ in range(3)]
    assert packed.select(torch.tensor([11, 4, 0])).weight.tolist() == [3.0, 0.25, 0.0]
    expected = sum(weight * loss(part) for weight, part in zip(counts, parts, strict=True)) / 4
    assert loss(whole) == pytest.approx(expected, rel=1e-5) and abs(expected - loss(parts[0])) > 1e-3


@pytest.mark.parametrize("bad", [None, "much", -1, float("nan")])
def test_what_is_no_weight_is_a_bad_row(tokenizer, tmp_path, bad):
    row = {"prompt": "the", "completions": [" a", " b"], "ranks": [1, 0], "trust": bad}
    data = Examples(byo.write_jsonl(tmp_path / "p.jsonl", [row]))
    with pytest.raises(ValueError, match="p.jsonl, line 1: 'trust' must be a weight"):
        list(tokenise(data, Codec(tokenizer), data.rejected, weight="trust"))
