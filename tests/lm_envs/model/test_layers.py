"""Gradient checkpointing for one forward: what it leaves behind, and what it asks of compiled programs."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lm_envs.model.layers import checkpointing, recomputable

FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    ),
}


def traces(model):
    """Every attribute and hook of every module."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    ]


@pytest.mark.parametrize("keep_products", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_leaves_the_model_as_it_was(family, keep_products):
    """A hook or a flag that stays behind makes compiled decoding compile again in every iteration."""
    model = FAMILIES[family]().eval()
    before = traces(model)
    ids = torch.arange(6).view(1, 6)
    plain = torch.autograd.grad(model(ids, use_cache=False).logits.square().sum(), list(model.parameters()))
    for _ in range(2):
        with checkpointing(model, keep_products=keep_products):
            assert all(layer.training and layer.gradient_checkpointing for layer in recomputable(model))
            logits = model(ids, use_cache=False).logits
        again = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        torch.testing.assert_close(again, plain)
    assert traces(model) == before
