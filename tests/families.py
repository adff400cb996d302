"""Every family of causal language models that is claimed, tiny and random, for the tests that hold for each of them.

``FAMILIES`` are those that are tested from all sides; ``WIDER`` are others that work too, each tested once. Windows are
shorter than the texts, and what could be missed where it is 1 or off (soft caps, scales, tied heads) is not.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import EOS

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
GPT = dict(vocab_size=10, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
EXPERTS = dict(GROUPED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
STATES = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=4)
SHARING = dict(
    GROUPED,
    num_hidden_layers=4,
    num_kv_shared_layers=2,  # the upper layers read what the lower ones cached
    sliding_window=3,
    layer_types=["sliding_attention", "full_attention"] * 2,
    hidden_size_per_layer_input=4,
)

# By name, or by name and what is special: the config's class, and its settings.
FAMILIES: dict[str, dict[str, Any] | tuple[str, dict[str, Any]]] = {
    "GPT2": GPT,
    "GPT2, untied": ("GPT2", dict(GPT, tie_word_embeddings=False)),
    "GPTNeoX": BASE,
    "OPT": dict(BASE, ffn_dim=24, word_embed_proj_dim=16, init_std=0.3),
    "OPT, projected": ("OPT", dict(BASE, ffn_dim=24, word_embed_proj_dim=8, init_std=0.3)),
    "Bloom": dict(vocab_size=10, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3),
    "Llama": GROUPED,
    "Llama, tied": ("Llama", dict(GROUPED, tie_word_embeddings=True)),
    "Mistral": dict(GROUPED, sliding_window=None),
    "Mistral, window": ("Mistral", dict(GROUPED, sliding_window=3)),
    "Mixtral": dict(GROUPED, num_local_experts=2, num_experts_per_tok=1),
    "Qwen2": GROUPED,
    "Qwen3": GROUPED,
    "Gemma2": dict(
        GROUPED,
        sliding_window=3,
        query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "Gemma3": (
        "Gemma3Text",
        dict(
            GROUPED,
            sliding_window=3,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "Phi3": GROUPED,
    "Olmo2": GROUPED,
    "SmolLM3": GROUPED,
    "Cohere": dict(GROUPED, logit_scale=0.3),
    "Granite": dict(GROUPED, logits_scaling=2.0, residual_multiplier=0.7, embedding_multiplier=1.5),
    "Mamba": dict(MAMBA, time_step_rank=2),
    "Mamba2": dict(MAMBA, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
    "Jamba": dict(  # attention in one layer, a recurrence in the other
        GROUPED,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=2,
        use_mamba_kernels=False,
    ),
    "FalconH1": dict(GROUPED, mamba_d_ssm=32, **STATES),  # both in each
}

WIDER: dict[str, dict[str, Any] | tuple[str, dict[str, Any]]] = {
    "Apertus": GROUPED,
    "Arcee": GROUPED,
    "Bamba": dict(GROUPED, attn_layer_indices=[1], **STATES),
    "BioGpt": BASE,
    "CodeGen": dict(GPT, n_head=4, rotary_dim=2),
    "Cohere2": dict(GROUPED, sliding_window=3, logit_scale=0.3),
    "DeepseekV3": dict(
        BASE,
        num_key_value_heads=2,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        **LATENT,
    ),
    "DiffLlama": dict(GROUPED, num_key_value_heads=2),
    "Ernie4_5": GROUPED,
    "Exaone4": dict(GROUPED, sliding_window=3),
    "Falcon": BASE,
    "FalconMamba": dict(MAMBA, time_step_rank=2),
    "Gemma": GROUPED,
    "Gemma3n": ("Gemma3nText", dict(SHARING, vocab_size_per_layer_input=10, altup_num_inputs=2, laurel_rank=4)),
    "Gemma4": ("Gemma4Text", dict(SHARING, vocab_size_per_layer_input=10, global_head_dim=8)),
    "Glm4": GROUPED,
    "GPTBigCode": GPT,
    "GPTJ": dict(GPT, rotary_dim=4),
    "GPTNeo": dict(
        BASE, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=3, num_hidden_layers=2
    ),
    "GptOss": dict(GROUPED, num_local_experts=2, num_experts_per_tok=1, sliding_window=3),
    "GraniteMoe": dict(GROUPED, num_local_experts=2, num_experts_per_tok=1, logits_scaling=2.0),
    "GraniteMoeHybrid": dict(
        GROUPED,
        layer_types=["mamba", "attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=8,
        **STATES,
    ),
    "Helium": GROUPED,
    "HunYuanDenseV1": GROUPED,
    "Lfm2": dict(GROUPED, layer_types=["conv", "full_attention"]),
    "ModernBertDecoder": dict(BASE, local_attention=3),
    "Mpt": dict(vocab_size=10, d_model=16, n_heads=2, n_layers=2, max_seq_len=64, initializer_range=0.3),
    "Nemotron": GROUPED,
    "NemotronH": dict(
        GROUPED,
        layers_block_type=["mamba", "attention", "mlp"],
        num_hidden_layers=3,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        chunk_size=4,
    ),
    "Olmo": GROUPED,
    "Olmo3": dict(GROUPED, sliding_window=3),
    "Olmoe": EXPERTS,
    "Persimmon": BASE,
    "Phi": BASE,
    "Phimoe": dict(GROUPED, num_local_experts=2, num_experts_per_tok=1),
    "Qwen2Moe": dict(EXPERTS, shared_expert_intermediate_size=8),
    "Qwen3Moe": EXPERTS,
    "Qwen3Next": dict(
        EXPERTS,
        shared_expert_intermediate_size=8,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "SeedOss": GROUPED,
    "StableLm": GROUPED,
    "Starcoder2": GROUPED,
    "XGLM": dict(vocab_size=10, d_model=16, num_layers=2, attention_heads=2, ffn_dim=24, init_std=0.3, pad_token_id=0),
}

# Those that the quick suite tests from every side: of models that cache and compute alike, one.
QUICK = {
    *("GPT2", "OPT, projected", "Bloom", "Llama", "Mistral, window", "Mixtral", "Gemma2", "Cohere", "Mamba", "Mamba2"),
    *("Jamba", "FalconH1", "DeepseekV3", "Gemma3n", "GPTNeo", "GptOss", "Lfm2", "Mpt", "Qwen3Next", "XGLM"),
}

# These compute parts in float32 whatever the weights' precision, or cannot do float64 at all.
SINGLE = {"Bloom", "Mixtral", "Gemma2", "Cohere", "Mamba", "Mamba2", "Jamba", "FalconH1"}


def tolerance(family: str) -> float:
    """What two ways to the same log-probability may differ by."""
    return 2e-5 if family in SINGLE or family in WIDER else 1e-9


def close(family: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """The two are equal up to rounding."""
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=tolerance(family))


def build(family: str, **changes: Any) -> PreTrainedModel:
    """The family's model, frozen; ``changes`` are further settings of its config."""
    given = FAMILIES.get(family) or WIDER[family]
    name, settings = given if isinstance(given, tuple) else (family, given)
    return random_model(name, {**settings, **changes}, double=family in FAMILIES and family not in SINGLE)


def random_model(name: str, settings: dict[str, Any], double: bool = False) -> PreTrainedModel:
    """A causal language model of a config's class and settings."""
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        model = model.double() if double else model
        for parameter in model.parameters():  # some initialisers start with zeros, and then nothing would show
            if parameter.ndim > 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model
