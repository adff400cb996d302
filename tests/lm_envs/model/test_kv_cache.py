"""Row caches: growth in place, and what has none. Families of models: see test_families."""

import pytest
import torch

from lm_envs.model.decoding import Decoder
from lm_envs.model.kv_cache import GrowingLayer, RowCache, can_cache
from lm_envs.model.layers import fuse
from tests.families import GROUPED, random_model
from tests.tiny import gpt2


def test_what_cannot_be_cached_is_computed_in_full():
    """Chunked attention: slower, and right."""
    chunked = dict(num_local_experts=2, intermediate_size_mlp=24, attention_chunk_size=4, num_experts_per_tok=1)
    model = random_model("Llama4Text", dict(GROUPED, **chunked))
    assert not can_cache(model)
    with pytest.raises(ValueError, match="Llama4ForCausalLM's cache cannot be exchanged"):
        RowCache(model)
    obs = torch.tensor([[-1, 1, 2, 3, -1], [4, 5, 6, 7, 8]])
    logits = Decoder(model)(obs)
    for row in range(2):
        known = model(input_ids=obs[row][obs[row] >= 0][None], use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[row], known, rtol=0, atol=2e-5)


def test_buffers_grow_in_place_and_rarely():
    layer, generator = GrowingLayer(room=16), torch.Generator().manual_seed(0)
    parts, made = [], set()
    for count in [5] + [1] * 60:
        parts.append(torch.randn(2, 3, count, 4, generator=generator))
        keys, values = layer.update(parts[-1], -parts[-1])
        made.add(layer._buffers[0].data_ptr())
        torch.testing.assert_close(keys, torch.cat(parts, dim=2), rtol=0, atol=0)
        torch.testing.assert_close(values, -keys, rtol=0, atol=0)
    assert len(made) <= 4
    assert layer._buffers[0].shape[2] == 84  # 5, and 16, and as many again, and as many again
    layer.narrow(10)
    layer.widen(4)
    assert layer.get_seq_length() == 65 - 10 + 4 and not layer.keys[:, :, :4].any()
    torch.testing.assert_close(layer.keys[:, :, 4:], torch.cat(parts, dim=2)[:, :, 10:], rtol=0, atol=0)


def test_the_fused_activation_is_the_same_function():
    stock, fused = gpt2(), fuse(gpt2())
    assert {type(block.mlp.act) for block in fused.transformer.h} == {torch.nn.GELU}
    assert type(stock.transformer.h[0].mlp.act) is not torch.nn.GELU
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(fused(ids).logits, stock(ids).logits, rtol=0, atol=1e-12)
    assert fused.state_dict().keys() == stock.state_dict().keys()
