"""Tokenizers of every kind that models come with, trained on the words of :mod:`tests.lm_envs.byo`."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.lm_envs import byo

WORDS = [*byo.TEXTS, "the story was weak", "the drama was good", "Answer: blue", "Question: which story ?"]


def _fast(inner: Tokenizer, lead: str = "<s>", tail: str = "") -> PreTrainedTokenizerFast:
    ids = [("<s>", inner.token_to_id("<s>")), ("</s>", inner.token_to_id("</s>"))]
    inner.post_processor = processors.TemplateProcessing(single=f"{lead} $A {tail}".strip(), special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _trained(inner: Tokenizer, trainer, **options) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    inner.train_from_iterator(WORDS, trainer(special_tokens=special, show_progress=False, **options))
    return inner


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's and Llama 3's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _fast(_trained(inner, trainers.BpeTrainer, vocab_size=340, initial_alphabet=alphabet))


def _llama(inner: Tokenizer, **trained) -> PreTrainedTokenizerFast:
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    alphabet = [*"abcdefghijklmnopqrstuvwxyzAQ:?.!0123456789▁\n"]
    return _fast(_trained(inner, trainers.BpeTrainer, vocab_size=170, initial_alphabet=alphabet, **trained))


def metaspace() -> PreTrainedTokenizerFast:
    """Mistral's and Phi-3's: a word's first token carries its space, the first word's too."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    return _llama(inner)


def legacy_metaspace() -> PreTrainedTokenizerFast:
    """Llama 2's: the space is put before every text by a normalizer."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return _llama(inner)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's pieces, as of a language model."""
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece(prefix="##")
    return _fast(_trained(inner, trainers.WordPieceTrainer, vocab_size=140))


def word_level() -> PreTrainedTokenizerFast:
    """Whole words; between them the decoder writes spaces."""
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(_trained(inner, trainers.WordLevelTrainer))


def unigram() -> PreTrainedTokenizerFast:
    """T5's: white space is one space, and every text gets an EOS."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    inner.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return _fast(_trained(inner, trainers.UnigramTrainer, vocab_size=120, unk_token="<unk>"), lead="", tail="</s>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    make.__name__: make for make in (byte_level, metaspace, legacy_metaspace, word_piece, word_level, unigram)
}
