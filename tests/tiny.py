"""A text task small enough for exact tests: a random GPT-2 in float64, ten words, a reward that can be computed by
hand."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lm_envs.tasks.base import TextTask

WORDS = ["<eos>", "a", "b", "c", "d", "e", "f", "g", "h", "i"]
EOS = 0


def tokenizer() -> PreTrainedTokenizerFast:
    """Word level; pad equals EOS on purpose."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def gpt2(
    seed: int = 0, dtype: torch.dtype = torch.float64, vocab: int = len(WORDS), context: int = 64
) -> GPT2LMHeadModel:
    """Two layers of width 16 with logits that differ enough to matter."""
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=context,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=EOS,
        eos_token_id=EOS,
        initializer_range=0.25,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    return model.to(dtype).eval().requires_grad_(False)


def count_b_minus_c(prompts, completions, **columns) -> list[float]:
    """+1 a "b", -1 a "c"."""
    return [text.split().count("b") - text.split().count("c") + 0.0 for text in completions]


def task(**changes) -> TextTask:
    """Five prompts of one to four tokens, up to six new ones."""
    arguments = dict(
        name="tiny",
        tokenizer=tokenizer(),
        reference=gpt2(),
        prompts={"train": [[1], [2, 3], [4, 5, 6], [7, 8, 9, 1], [3, 1]], "test": [[5], [6, 2, 1]]},
        reward=count_b_minus_c,
        judge=count_b_minus_c,
        eos_token_id=EOS,
        max_new_tokens=6,
        kl_coef=0.1,
    )
    return TextTask(**{**arguments, **changes})
