"""Single steps put together again to the texts they are prefixes of."""

import numpy as np
import pytest

from lm_envs.algos.other_libraries.prefix_chains import prefix_chains


def test_prefix_chains_by_hand():
    obs = np.array([[-1, 5, 7, -1], [-1, 5, -1, -1], [3, 5, -1, -1], [-1, 5, -1, -1], [-1, 5, -1, -1]])
    chains = prefix_chains(obs, np.array([0, 7, 7, 0, 7]), 2)
    assert chains.texts.tolist() == [[-1, 5, 0, -1], [-1, 5, 7, 0], [3, 5, 7, -1]]
    assert chains.row.tolist() == [1, 1, 2, 0, 1] and chains.position.tolist() == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="step 1 acts after its response is full"):
        prefix_chains(np.array([[1, 2, -1], [1, 2, 3]]), np.array([0, 0]), 1)


@pytest.mark.parametrize("vocabulary", [3, 300])  # 300 takes two bytes
def test_prefix_chains_hold_every_step_in_as_few_texts_as_there_can_be(vocabulary):
    generator = np.random.default_rng(vocabulary)
    obs = np.full((200, 7), -1)
    obs[:, 1] = generator.integers(0, 2, 200)
    lengths = generator.integers(0, 5, 200)
    for row, length in enumerate(lengths):
        obs[row, 2 : 2 + length] = generator.choice([0, 1, vocabulary - 1], length)
    actions = generator.choice([0, 1, vocabulary - 1], 200)
    texts, row, position = prefix_chains(obs, actions, 2)
    assert position.tolist() == lengths.tolist()
    wanted = {(*o[: 2 + n], a) for o, n, a in zip(obs.tolist(), lengths, actions.tolist(), strict=True)}
    for step in range(200):
        assert texts[row[step], : 3 + lengths[step]].tolist() == [*obs[step, : 2 + lengths[step]], actions[step]]
    leaves = {text for text in wanted if not any(o != text and o[: len(text)] == text for o in wanted)}
    assert {tuple(t for i, t in enumerate(text) if i < 2 or t >= 0) for text in texts.tolist()} == leaves
    assert len(texts) == len(leaves)
