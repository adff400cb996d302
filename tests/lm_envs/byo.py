"""A policy, reward models and prompts as a user would bring them: tiny, random, and saved by ``save_pretrained``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TEXTS = [
    f"the {a} cat {b} a small {c} ." for a in ("old", "grey") for b in ("saw", "ate", "hid") for c in ("fish", "bird")
]
CONTEXT = 48


def byte_level_bpe(eos: str | None = "</s>", vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """As Llama 3's: byte-level, a BOS before every text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos)


def llama(vocabulary: int, seed: int = 0, context: int = CONTEXT) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, an output of its own."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.2,
        )
    )


def word_piece(folder: Path) -> BertTokenizerFast:
    """BERT's: lower-cased word pieces between [CLS] and [SEP]."""
    words = sorted({word for text in TEXTS for word in text.split()})
    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*words, *letters])]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})


def bert(vocabulary: int, labels: int = 1, seed: int = 0) -> BertForSequenceClassification:
    """An encoder with a pooler and a head."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            num_labels=labels,
            initializer_range=0.5,
        )
    )


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """A row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class Folders:
    """Where everything lies."""

    root: Path

    @property
    def options(self) -> dict[str, str]:
        """What the task is loaded with."""
        return {name: str(self.root / name) for name in ("policy", "reward_model")} | {
            "prompts": str(self.root / "prompts.jsonl")
        }


def make(root: Path) -> Folders:
    """Save a Llama policy, a BERT reward model with its own tokenizer, a GPT-2 judge and twelve prompts."""
    tokenizer = byte_level_bpe()
    llama(len(tokenizer)).save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")
    pieces = word_piece(root)
    bert(len(pieces)).save_pretrained(root / "reward_model")
    pieces.save_pretrained(root / "reward_model")
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=2,
        eos_token_id=1,
        bos_token_id=0,
    )
    GPT2ForSequenceClassification(config).save_pretrained(root / "judge")
    tokenizer.save_pretrained(root / "judge")
    write_jsonl(root / "prompts.jsonl", [{"prompt": text[:-2]} for text in TEXTS])
    return Folders(root)


def for_shipped_prompts(folder: Path) -> Path:
    """A small model with a context for the prompts of the tasks on real text, and no chat template."""
    tokenizer = byte_level_bpe(vocabulary=400)
    llama(len(tokenizer), context=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
