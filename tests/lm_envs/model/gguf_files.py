"""A writer of small GGUF files, by hand from the format's description: a Llama with a byte-level tokenizer."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

F32, Q8_0 = 0, 8  # ids of the kinds of tensors
BLOCK = 32  # weights that share a scale
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "Ġc", "<|endoftext|>"]
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"


def tiny_llama() -> LlamaForCausalLM:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, max_position_embeddings=64, **sizes)
    return LlamaForCausalLM(config).eval()


def in_eights(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and whole numbers of Q8_0, a block of 32 at a time."""
    blocks = weight.reshape(-1, BLOCK)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    return scale, np.round(blocks / np.maximum(scale.astype(np.float32), 1e-12)).astype(np.int8)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    """A value after its type: 4 is a 32-bit number, 6 a float, 7 a bool, 8 a text, 9 a list."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    kind = 8 if isinstance(value[0], str) else 5
    items = b"".join(_string(x) if kind == 8 else struct.pack("<i", x) for x in value)
    return struct.pack("<IIQ", 9, kind, len(value)) + items


def write(model: LlamaForCausalLM, path: Path, kind: int = F32, architecture: str = "llama") -> Path:
    """Write a model; its matrices as ``kind``, its norms as plain numbers."""
    config = model.config
    facts: dict[str, Any] = {"general.architecture": architecture, "general.name": "tiny", "general.alignment": BLOCK}
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    about: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.hidden_size // heads,
        "rope.freq_base": 10000.0,
        "vocab_size": config.vocab_size,
    }
    facts |= {f"{architecture}.{name}": value for name, value in about.items()}
    words = {
        "model": "gpt2",
        "tokens": WORDS,
        "token_type": [3, 3, 3] + [1] * (len(WORDS) - 4) + [3],
        "merges": ["a b", "Ġ c"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": False,
        "chat_template": CHAT,
    }
    facts |= {f"tokenizer.{'' if name == 'chat_template' else 'ggml.'}{name}": v for name, v in words.items()}
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in model.state_dict().items():
        weight = parameter.numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            part = _PARTS[rest.removesuffix(".weight")]
            if part in ("attn_q", "attn_k"):  # llama.cpp turns pairs of neighbors, transformers two halves
                count = heads if part == "attn_q" else groups
                weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            tensors[f"blk.{layer}.{part}.weight"] = weight
        else:
            short = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            tensors[short[name.removesuffix(".weight")] + ".weight"] = weight
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    head += b"".join(_string(name) + _value(value) for name, value in facts.items())
    body = b""
    for name, weight in tensors.items():
        mine = kind if weight.ndim == 2 else F32
        data = np.ascontiguousarray(weight, np.float32).tobytes()
        if mine == Q8_0:
            data = b"".join(s.tobytes() + n.tobytes() for s, n in zip(*in_eights(weight), strict=True))
        head += _string(name) + struct.pack("<I", weight.ndim) + struct.pack(f"<{weight.ndim}Q", *weight.shape[::-1])
        head += struct.pack("<IQ", mine, len(body))
        body += data + bytes(-len(data) % BLOCK)
    path.write_bytes(head + bytes(-len(head) % BLOCK) + body)
    return path
