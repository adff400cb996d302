"""Row caches: families of models, rows that stand still, grow, leave and are replaced; growth in place."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lm_envs.decoding import Decoder, generate
from lm_envs.fused import fuse_activations
from lm_envs.observations import left_pad
from lm_envs.row_cache import GrowingLayer, RowCache, can_cache
from lm_envs.scoring import response_logits, response_logprob
from tests.tiny import EOS, gpt2

BASE = dict(
    vocab_size=10,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=EOS,
    eos_token_id=EOS,
    pad_token_id=EOS,
)
GROUPED = dict(BASE, num_key_value_heads=1, head_dim=8)
MAMBA = dict(vocab_size=10, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.3, pad_token_id=EOS)
FAMILIES = {
    "GPT2": dict(vocab_size=10, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3),
    "GPTNeoX": BASE,
    "OPT": dict(BASE, ffn_dim=24, word_embed_proj_dim=16, init_std=0.3),
    "Bloom": dict(vocab_size=10, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3),
    "Llama": GROUPED,
    "Mistral": dict(GROUPED, sliding_window=None),
    "Mistral, window": ("Mistral", dict(GROUPED, sliding_window=3)),
    "Mixtral": dict(GROUPED, num_local_experts=2, num_experts_per_tok=1),
    "Qwen2": GROUPED,
    "Qwen3": GROUPED,
    "Gemma2": dict(GROUPED, sliding_window=3, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
    "Gemma3": ("Gemma3Text", dict(GROUPED, sliding_window=3, query_pre_attn_scalar=8, sliding_window_pattern=2)),
    "Phi3": dict(GROUPED),
    "Olmo2": GROUPED,
    "SmolLM3": GROUPED,
    "Mamba": dict(MAMBA, time_step_rank=2),
    "Mamba2": dict(MAMBA, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
}

# These compute parts in float32 whatever the weights' precision, or cannot do float64 at all.
SINGLE = {"Bloom", "Mixtral", "Gemma2", "Mamba", "Mamba2"}


def close(family, found, expected):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=2e-5 if family in SINGLE else 1e-9)


def build(family):
    given = FAMILIES[family]
    name, settings = given if isinstance(given, tuple) else (family, given)
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        model = model if family in SINGLE else model.double()
        for parameter in model.parameters():  # some initialisers start with zeros, and then nothing would show
            if parameter.ndim > 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def alone(model, tokens):
    """Next-token logits of one text, unpadded and without a cache."""
    return model(input_ids=torch.as_tensor(tokens)[None], use_cache=False).logits[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_padding_changes_no_logprob(family):
    model = build(family)
    prompt, response = torch.tensor([1, 2]), torch.tensor([3, 4, 5, 6, 7, EOS])
    plain, _ = response_logits(model, prompt[None], response[None])
    for t in range(6):  # and they are those of the model itself
        close(family, plain[0, t], alone(model, [1, 2, *response[:t].tolist()]))
    padded, states = response_logits(
        model,
        torch.tensor([[-1, -1, -1, 1, 2], [5, 6, 7, 8, 9]]),
        torch.tensor([[3, 4, 5, 6, 7, EOS, -1, -1], [1, 1, 1, 1, 1, 1, 1, 1]]),
        hidden=True,
    )
    close(family, padded[0, :6], plain[0])
    assert states.shape[:2] == (2, 8) and plain[0].std(dim=0).min() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_under_any_use_is_the_model(family):
    model = build(family)
    assert can_cache(model)
    decoder, generator = Decoder(model), np.random.default_rng(0)
    places, steps, rows = 4, 8, 4
    obs = torch.full((rows, places + steps), -1)

    def restart(row):
        length = generator.integers(1, places + 1)
        obs[row] = -1
        obs[row, places - length : places] = torch.tensor(generator.integers(0, 10, length))

    for row in range(rows):
        restart(row)
    for _ in range(24):
        logits = decoder(obs)
        for row in range(rows):
            close(family, logits[row], alone(model, obs[row][obs[row] >= 0]))
        for row in range(rows):
            length = int((obs[row, places:] >= 0).sum())
            what = generator.choice(["grow"] * 6 + ["stand", "restart"])
            if what == "restart" or length == steps:
                restart(row)
            elif what == "grow":
                obs[row, places + length] = int(generator.integers(0, 10))


@pytest.mark.parametrize("family", FAMILIES)
def test_bulk_is_row_by_row_and_its_logprob_the_models(family):
    """Rows leave as they end; the values' hidden states are those that teacher forcing gives."""
    model = build(family)
    prompts = torch.as_tensor(left_pad([[1], [2, 3], [4, 5, 6], [7, 8, 9, 1]] * 3, 4))
    uniforms = torch.rand(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden, limits = {}, dict(max_new_tokens=8, min_new_tokens=2)
    # A token that some rows end on and not all.
    ends = [int((generate(model, prompts, uniforms, token, **limits)[0] == token).sum()) for token in range(10)]
    early = next(token for token, count in enumerate(ends) if 2 <= count <= 10)

    def observe(t, rows, states):
        hidden.update({(row, t): state for row, state in zip(rows.tolist(), states, strict=True)})

    response, logprob = generate(model, prompts, uniforms, early, **limits, observe=observe)
    for row in range(12):
        single, _ = generate(model, prompts[row : row + 1], uniforms[row : row + 1], early, **limits)
        assert single[0].tolist() == response[row].tolist()
    close(family, response_logprob(model, prompts, response, early, min_new_tokens=2, batch_size=5), logprob)
    _, states = response_logits(model, prompts, response, hidden=True)
    lengths = (response >= 0).sum(dim=1).tolist()
    assert len(hidden) == sum(lengths) and min(lengths) < 8
    for (row, t), state in hidden.items():
        close(family, state, states[row, t])


def test_a_row_that_stands_still_and_is_not_moved_is_caught(monkeypatch):
    """Negative control: without taking the column back a sliding window sees one token fewer."""
    monkeypatch.setattr(GrowingLayer, "release", lambda self, rows: None)
    with pytest.raises(AssertionError):
        test_the_decoder_under_any_use_is_the_model("Mistral, window")


def test_what_cannot_be_cached_is_computed_in_full():
    """Layers that share a cache: slower, and right."""
    config = transformers.Llama4TextConfig(
        **dict(GROUPED, num_local_experts=2, intermediate_size_mlp=24, attention_chunk_size=4, num_experts_per_tok=1)
    )
    model = AutoModelForCausalLM.from_config(config).double().eval()
    assert not can_cache(model)
    with pytest.raises(ValueError, match="Llama4ForCausalLM's cache cannot be exchanged"):
        RowCache(model)


def test_buffers_grow_in_place_and_rarely():
    layer, generator = GrowingLayer(room=16), torch.Generator().manual_seed(0)
    parts, made = [], set()
    for count in [5] + [1] * 60:
        parts.append(torch.randn(2, 3, count, 4, generator=generator))
        keys, values = layer.update(parts[-1], -parts[-1])
        made.add(layer._buffers[0].data_ptr())
        torch.testing.assert_close(keys, torch.cat(parts, dim=2), rtol=0, atol=0)
        torch.testing.assert_close(values, -keys, rtol=0, atol=0)
    assert len(made) <= 3
    layer.narrow(10)
    layer.widen(4)
    assert layer.get_seq_length() == 65 - 10 + 4 and not layer.keys[:, :, :4].any()
    torch.testing.assert_close(layer.keys[:, :, 4:], torch.cat(parts, dim=2)[:, :, 10:], rtol=0, atol=0)


def test_the_fused_activation_is_the_same_function():
    stock, fused = gpt2(), fuse_activations(gpt2())
    assert {type(block.mlp.act) for block in fused.transformer.h} == {torch.nn.GELU}
    assert type(stock.transformer.h[0].mlp.act) is not torch.nn.GELU
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(fused(ids).logits, stock(ids).logits, rtol=0, atol=1e-12)
    assert fused.state_dict().keys() == stock.state_dict().keys()
