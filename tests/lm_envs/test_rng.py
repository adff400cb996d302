"""Counted randomness: known answers of the generator, and uniforms that depend on nothing but their place."""

import numpy as np
import pytest
from scipy import stats

from lm_envs import rng


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # the generator's published known-answer vectors (Random123)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers(counter, key, answer):
    assert rng.philox4x32(np.array(counter, dtype=np.uint64), key).tolist() == list(answer)


def test_uniforms_are_a_function_of_their_place():
    whole = rng.uniform(7, rng.TOKEN, np.arange(50)[:, None], np.arange(9))
    assert whole[31, 4] == rng.uniform(7, rng.TOKEN, 31, 4)
    assert np.unique(whole).size == whole.size
    for other in (rng.uniform(8, rng.TOKEN, 31, 4), rng.uniform(7, rng.PROMPT, 31, 4)):
        assert other != whole[31, 4]


def test_uniforms_are_uniform_and_uncorrelated():
    numbers = rng.uniform(3, rng.TOKEN, np.arange(2000)[:, None], np.arange(10))
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
    for axis in (0, 1):
        a, b = np.split(numbers.T if axis else numbers, 2)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03


def test_every_one_of_53_bits_is_drawn():
    """Of 2,000 numbers each bit is set in about half: a generator of 32 bits leaves the last 21 empty."""
    numbers = rng.uniform(5, rng.TOKEN, np.arange(2000))
    whole = (numbers * 2.0**53).astype(np.uint64)
    assert (whole.astype(np.float64) * 2.0**-53 == numbers).all()
    share = [float(((whole >> np.uint64(bit)) & np.uint64(1)).mean()) for bit in range(53)]
    assert all(abs(x - 0.5) < 4 * 0.5 / 2000**0.5 for x in share)


def test_a_number_is_made_of_all_that_names_its_place():
    """The counter (position, episode low, episode high, stream) and the seed as key, in all their bits."""
    for seed, stream, episode, position in ((5, 1, 7, 3), (5 + 2**40, 6, 2**40 + 9, 2**31), (2**63, 0, 2**33, 0)):
        counter = np.array([position, episode % 2**32, episode // 2**32, stream], dtype=np.uint64)
        word = rng.philox4x32(counter, (seed % 2**32, seed // 2**32)).tolist()
        found = rng.uniform(seed, stream, episode, position)
        assert found == ((word[0] << 32 | word[1]) >> 11) / 2**53
        assert rng.integers(seed, stream, episode, 1000, position) == int(found * 1000)


def test_integers_stay_below_high_and_hit_everything():
    drawn = rng.integers(0, rng.PROMPT, np.arange(1000), 7)
    assert sorted(set(drawn.tolist())) == list(range(7))


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match="seed"):
        rng.uniform(-1, 0, 0)
