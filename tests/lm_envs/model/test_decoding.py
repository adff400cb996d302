"""Incremental decoding and sampling, which follows the distribution it reports (law 3). That the cached answer is the
uncached one, whatever the caller does to its rows (law 4), is in test_families."""

import pytest
import torch

from lm_envs.kernels.logprob_kl import log_softmax
from lm_envs.model.decoding import Decoder, forbid_early_eos, generate, greedy, sample
from lm_envs.model.forwards import response_logprob
from lm_envs.model.kv_cache import RowCache
from lm_envs.model.tokens import left_pad, model_inputs
from tests.tiny import EOS, gpt2


def alone(model, row):
    """The next-token logits of one text without any padding."""
    tokens = row[row >= 0]
    return model(input_ids=tokens[None]).logits[0, -1]


def test_a_decoder_that_trusts_its_cache_is_caught(monkeypatch):
    """Negative control: without masking a refilled row's old columns the answer is wrong."""
    model = gpt2()

    def careless(self, rows, obs):
        logits = original(self, rows, obs)
        self.lengths[rows] = self.columns
        return logits

    original = RowCache.refill
    monkeypatch.setattr(RowCache, "refill", careless)
    with pytest.raises(AssertionError):
        decoder = Decoder(model)
        obs = torch.tensor([[1, 2, 3, -1, -1], [4, 5, 6, -1, -1]])
        decoder(obs)
        obs = torch.tensor([[1, 2, 3, 4, -1], [-1, -1, 7, -1, -1]])
        decoder(obs)
        obs = torch.tensor([[1, 2, 3, 4, 5], [-1, -1, 7, 8, -1]])
        torch.testing.assert_close(decoder(obs)[1], alone(model, obs[1]), rtol=0, atol=1e-9)


def test_what_only_looks_like_one_more_token_is_seen():
    """After steps in which all rows grew: a row that stands, is swapped, changed behind its end, or emptied."""
    model = gpt2()
    start = torch.tensor([[1, 2, -1, -1, -1, -1], [-1, 5, -1, -1, -1, -1]])
    grown = [start, start.clone(), start.clone()]
    grown[1][:, 2] = torch.tensor([3, 6])
    grown[2][:, 2:4] = torch.tensor([[3, 4], [6, 7]])
    for last in (
        [[1, 2, 3, 4, 8, -1], [-1, 5, 6, 7, 9, -1]],
        [[1, 2, 3, 4, 8, -1], [-1, 5, 6, 7, -1, -1]],
        [[1, 2, 3, 4, 8, -1], [-1, 5, 2, 7, 9, -1]],
        [[1, 2, 3, 4, 8, -1], [6, 5, 6, 7, 9, -1]],
        [[1, 2, 3, 4, 8, 9], [-1, 5, 6, 7, 9, -1]],
        [[1, 2, 3, 4, 8, -1], [-1, 7, -1, -1, -1, -1]],
        [[1, 2, 3, 4, -1, -1], [-1, 5, 6, 7, -1, -1]],
    ):
        decoder = Decoder(model)
        for obs in (*grown, torch.tensor(last)):
            given = obs.clone()
            found = decoder(given)
            given.fill_(-7)  # the caller may use its own array again
            for row, logits in zip(obs, found, strict=True):
                torch.testing.assert_close(logits, alone(model, row), rtol=0, atol=1e-9)


def test_steps_in_which_all_rows_grow_go_on_to_the_last_place(monkeypatch):
    model = gpt2()
    decoder, slow = Decoder(model), []
    original = Decoder._step
    monkeypatch.setattr(Decoder, "_step", lambda self, *given: slow.append(1) or original(self, *given))
    text = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [-1, 2, 3, 9, 8, 7, 6]])
    for end in range(2, 8):
        obs = torch.where(torch.arange(7) < end, text, -1)
        for row, logits in zip(obs, decoder(obs), strict=True):
            torch.testing.assert_close(logits, alone(model, row), rtol=0, atol=1e-9)
    assert len(slow) == 1  # the first; the others were told at once


def test_wrong_positions_are_caught():
    """Negative control of law 4: positions counted from the padding give other logits."""
    model = gpt2()
    inputs = model_inputs(torch.tensor([[-1, -1, -1, 1, 2]]))
    right = model(**inputs).logits[0, -1]
    wrong = model(**{**inputs, "position_ids": torch.arange(5)[None]}).logits[0, -1]
    assert (right - wrong).abs().max() > 1e-3


def test_generate_matches_row_by_row_and_its_logprob_is_the_models():
    model = gpt2()
    prompts = torch.as_tensor(left_pad([[1], [2, 3], [4, 5, 6], [7, 8, 9, 1]] * 4, 4))
    uniforms = torch.rand(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = dict(max_new_tokens=6, temperature=1.5, min_new_tokens=2)
    response, logprob = generate(model, prompts, uniforms, EOS, **arguments)
    for row in range(16):
        single, single_logprob = generate(model, prompts[row : row + 1], uniforms[row : row + 1], EOS, **arguments)
        assert single[0].tolist() == response[row].tolist()
        torch.testing.assert_close(single_logprob[0], logprob[row], rtol=0, atol=1e-9)
    scored = response_logprob(model, prompts, response, EOS, temperature=1.5, min_new_tokens=2, batch_size=5)
    torch.testing.assert_close(scored, logprob, rtol=0, atol=1e-9)
    ended = (response == EOS).any(dim=1)
    assert ended.any() and not ended.all()
    assert ((response >= 0).sum(dim=1)[ended] >= 3).all()


def test_greedy_takes_the_likeliest_token_that_is_allowed():
    """Token by token, each row alone; without a least length one would end at once."""
    model, prompts = gpt2(), [[4, 5, 6], [1], [7, 8, 9, 1], [2, 3]]
    with torch.no_grad():
        hidden = model(torch.tensor([[1]]), output_hidden_states=True).hidden_states[-1][0, -1]
        model.transformer.wte.weight[EOS] = 3 * hidden
    for least in (0, 3):
        expected = []
        for prompt in prompts:
            response = []
            while len(response) < 6 and EOS not in response:
                logits = alone(model, torch.tensor(prompt + response))
                if len(response) < least:
                    logits[EOS] = float("-inf")
                response.append(int(logits.argmax()))
            expected.append(response)
        assert greedy(model, prompts, EOS, max_new_tokens=6, min_new_tokens=least, batch_size=3) == expected
        assert min(map(len, expected)) == least + 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("early", [0, 1])
def test_frequencies_match_the_reported_logprob(temperature, early):
    """Law 3, under every temperature and action mask."""
    logits = forbid_early_eos(torch.tensor([1.0, 0.0, -1.0, 2.0, float("-inf")]).double(), 0, EOS, early)
    count = 40_000
    uniforms = (
        torch.arange(count).double() + 0.5
    ) / count  # a grid: the frequencies have no sampling error to speak of
    tokens, logprob = sample(logits.expand(count, 5), uniforms, temperature)
    frequency = torch.bincount(tokens, minlength=5).double() / count
    torch.testing.assert_close(frequency, log_softmax(logits, temperature).exp(), rtol=0, atol=2e-4)
    torch.testing.assert_close(logprob, log_softmax(logits, temperature)[tokens])
    assert frequency[4] == 0 and (frequency[EOS] == 0) == (early == 1)


def test_a_temperature_forgotten_in_the_logprob_is_caught():
    """Negative control of law 3."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).double()
    count = 10_000
    tokens, _ = sample(logits.expand(count, 4), (torch.arange(count).double() + 0.5) / count, 0.5)
    frequency = torch.bincount(tokens, minlength=4).double() / count
    assert (frequency - log_softmax(logits).exp()).abs().max() > 0.05


def test_the_ends_of_the_unit_interval_hit_possible_tokens():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, 4)
    tokens, _ = sample(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("vocabulary", [63, 1000, 2048, 2049, 2112, 50_257])
def test_blocks_give_the_tokens_of_the_plain_search(vocabulary):
    """The sum by blocks is the cumulative sum of the whole; a token without probability is never hit."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(50, vocabulary, generator=generator, dtype=torch.float64)
    logits[:, ::3] = float("-inf")
    uniforms = torch.rand(50, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    tokens, logprob = sample(logits, uniforms, 0.7)
    p = (logits / 0.7).softmax(dim=-1)
    cdf = p.cumsum(dim=-1)
    expected = torch.searchsorted(cdf, uniforms.unsqueeze(-1), right=True).squeeze(-1).clamp(max=vocabulary - 1)
    assert tokens[2:].tolist() == expected[2:].tolist() and tokens[0] == 1
    assert (p.gather(-1, tokens.unsqueeze(-1)) > 0).all()
    torch.testing.assert_close(logprob, p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log(), rtol=0, atol=1e-12)
    single, _ = sample(logits.float(), uniforms, 0.7)
    assert (single == tokens).float().mean() > 0.95


@pytest.mark.parametrize("vocabulary", [2048, 8192])
def test_tokens_at_the_edges_of_intervals(vocabulary):
    """A uniform at the beginning of a token's interval is that token's; a thin tail behind a likely token is reached,
    though float32 has no numbers between 1 and 1 + 1e-7."""
    edges = torch.arange(0, vocabulary, 64)
    assert torch.equal(sample(torch.zeros(len(edges), vocabulary), edges.double() / vocabulary)[0], edges)
    logits = torch.full((1, vocabulary), -23.0)
    logits[0, 0] = 0.0
    weights = logits[0].double().exp()
    for share in (0.25, 0.5, 0.75):
        cdf = weights.cumsum(0) / weights.sum()
        expected = int(share * vocabulary)
        token = int(sample(logits, cdf[expected - 1 : expected])[0])
        assert abs(token - expected) <= 64  # a block's sum is of float32
