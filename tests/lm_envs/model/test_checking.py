"""Trying a model before it is used: what is right passes, and what is not is refused with the reason."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lm_envs.model.checking import check_model
from lm_envs.model.decoding import Decoder
from lm_envs.model.kv_cache import RowCache, can_cache
from tests import tiny
from tests.families import BASE, FAMILIES, GROUPED, QUICK, WIDER, build, random_model
from tests.marks import slow_unless

CHUNKED = dict(GROUPED, num_local_experts=2, intermediate_size_mlp=24, attention_chunk_size=4, num_experts_per_tok=1)
RECURRENT = dict(
    BASE, lru_width=16, attention_window_size=3, num_key_value_heads=1, block_types=("recurrent", "attention")
)


@pytest.mark.parametrize("family", slow_unless(QUICK.__contains__, [*FAMILIES, *WIDER]))
def test_what_is_claimed_passes(family):
    check_model(build(family))


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Mixtral", "Gemma2", "Mamba2", "FalconH1"])
def test_in_bfloat16_too(family):
    check_model(build(family).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("RecurrentGemma", RECURRENT),
        ("Rwkv", dict(vocab_size=10, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)),
    ],
)
def test_recurrences_that_read_padding_are_refused(name, settings, dtype):
    model = random_model(name, settings).to(dtype)
    with pytest.raises(ValueError, match="policy: the log-probabilities of .* change with the padding of a batch"):
        check_model(model, recompute=True)


def test_an_encoder_is_refused():
    config = transformers.BertConfig(**BASE, is_decoder=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="mine: the predictions of bert change with later tokens"):
        check_model(model, "mine")


def test_a_cache_without_rows_needs_a_word():
    """Allowed, each token is computed in full: by copies of the model as well."""
    model = random_model("Llama4Text", CHUNKED)
    with pytest.raises(ValueError, match="cannot be kept row by row.* recompute=True"):
        check_model(model)
    check_model(model, recompute=True)
    assert not can_cache(copy.deepcopy(model))


def test_a_task_says_that_its_model_is_slow():
    model = random_model("Llama4Text", CHUNKED)
    with pytest.warns(UserWarning, match="'tiny': the cache of llama4_text cannot be kept row by row.* used anyway"):
        tiny.task(reference=model)
    check_model(model, recompute=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.task(reference=model)


def test_a_cache_that_gives_other_numbers_is_refused_or_left_alone(monkeypatch):
    model = build("Llama")
    advance = RowCache.advance
    monkeypatch.setattr(RowCache, "advance", lambda self, *given: advance(self, *given).flip(-1))
    with pytest.raises(ValueError, match="other log-probabilities with its cache"):
        check_model(model)
    check_model(model, recompute=True)
    obs = torch.tensor([[1, 2, -1]])
    decoder = Decoder(model)
    decoder(obs)
    obs[0, 2] = 3
    torch.testing.assert_close(decoder(obs), model(input_ids=obs, use_cache=False).logits[:, -1], rtol=0, atol=1e-9)


def test_numbers_that_are_not_finite_are_refused():
    model = build("Llama")
    model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite in float64"):
        check_model(model)


def test_checking_moves_no_generator_and_no_weight():
    model, state = build("Qwen2"), torch.get_rng_state()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    check_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
