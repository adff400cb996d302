"""Text and ids, there and back, for every kind of tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import processors
from transformers import BartConfig, BartForConditionalGeneration

from lm_envs.model.chat import BadExample, split_answer
from lm_envs.model.text import Codec
from tests.lm_envs import byo
from tests.lm_envs.tokenizers import KINDS, byte_level, metaspace, unigram, word_level

USER, SAID = {"role": "user", "content": "the old cat"}, {"role": "assistant", "content": "hid"}
TURNS = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
THINKS = TURNS + "{% if add_generation_prompt %}<s>assistant\n(thoughts){% endif %}"
PAIRS = [("the drama was", " weak"), ("the old cat", " saw a small fish"), ("Answer:", " blue")]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


# Ids to text


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_and_response_join_to_the_text_of_all_their_ids(tokenizer, prompt, completion):
    ids, (response,) = Codec(tokenizer).encode(prompt, [completion])
    (head,), (tail,) = Codec(tokenizer).decode([ids], [response])
    assert head + tail == tokenizer.decode(ids + response, skip_special_tokens=True)
    assert tail == completion  # the space of its first word is there


def test_a_response_that_is_decoded_alone_loses_its_space():
    """Negative control: of most kinds."""
    lost = set()
    for name, make in KINDS.items():
        made = make()
        _, (response,) = Codec(made).encode("the drama was", [" weak"])
        if made.decode(response, skip_special_tokens=True) == "weak":
            lost.add(name)
    assert lost == set(KINDS) - {"byte_level"}


def test_half_a_letter_belongs_to_the_response():
    """By hand: the two bytes of an umlaut, one on either side."""
    made = byte_level()
    ids = made("x ü", add_special_tokens=False)["input_ids"]
    assert made.decode(ids[:-1]) != "x ü"[:-1]
    assert Codec(made).decode([ids[:-1], ids], [ids[-1:], []]) == (["x ", "x ü"], ["ü", ""])
    assert Codec(made).decode([], []) == ([], [])


# Text to ids


@pytest.mark.parametrize(("prompt", "completion"), [*PAIRS, ("Answer: ", "blue"), ("the stor", "y"), ("a\n", "cat")])
def test_a_completion_is_written_as_it_stands_behind_its_prompt(tokenizer, prompt, completion):
    ids, (response,) = Codec(tokenizer).encode(prompt, [completion])
    assert ids == Codec(tokenizer).encode(prompt)[0]  # what a policy is given
    if tokenizer.unk_token_id not in ids:  # a tokenizer of whole words cannot write the rest of one
        joined = tokenizer(prompt + completion)["input_ids"]
        texts = tokenizer.batch_decode([ids + response, joined], skip_special_tokens=True)
        assert texts[0] == texts[1]


def test_a_completion_encoded_alone_gains_a_space():
    """Negative control, and by hand."""
    made = metaspace()
    ids, (response,) = Codec(made).encode("Answer: ", ["blue"])
    assert made.convert_ids_to_tokens(ids + response) == ["<s>", "▁Answer:", "▁", "b", "lue", "</s>"]
    alone = made("blue", add_special_tokens=False)["input_ids"]
    assert made.decode(ids + alone, skip_special_tokens=True) == "Answer:  blue"


def test_special_tokens_in_a_text_are_read_and_there_is_one_bos():
    made = byte_level()
    codec, (bos, eos) = Codec(made), (made.bos_token_id, made.eos_token_id)
    plain = made("the old cat", add_special_tokens=False)["input_ids"]
    assert codec.encode("the old cat")[0] == codec.encode("<s>the old cat")[0] == [bos, *plain]
    # an EOS that ends a turn of the prompt stays, and is not taken for the end of the completion
    ids, (response,) = codec.encode("the old cat</s>", [" hid</s> and more"])
    assert ids == [bos, *plain, eos] and response == [*made(" hid", add_special_tokens=False)["input_ids"], eos]
    assert codec.encode("", ["<s>the old cat"]) == ([bos], [[*plain, eos]])


def test_an_eos_that_the_tokenizer_puts_behind_every_text_is_for_encoders():
    made = unigram()
    causal, eos = Codec(made), made.eos_token_id
    plain = made("the old cat", add_special_tokens=False)["input_ids"]
    assert causal.encode("the old cat")[0] == plain and made("the old cat")["input_ids"] == [*plain, eos]
    one = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1)
    config = BartConfig(vocab_size=len(made), d_model=8, **one)
    encoder = Codec(made, BartForConditionalGeneration(config))
    ids, (response,) = encoder.encode("the old cat", ["hid"])
    assert ids == [*plain, eos] == encoder.encode("the old cat</s>")[0]
    # the decoder's text is one of its own: it begins with a word, and is decoded alone
    assert response == made("hid")["input_ids"]
    assert encoder.decode([ids], [response]) == (["the old cat"], ["hid"])
    assert encoder.fingerprint != causal.fingerprint


def test_what_has_no_tokens_is_refused():
    made = word_level()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(BadExample, match="the prompt is empty"):
        Codec(made).encode("  ")
    with pytest.raises(BadExample, match="a completion is empty"):
        Codec(made).encode("the", ["</s>"])


# Chat


def test_the_newline_behind_a_turn_is_not_learned(tokenizer):
    tokenizer.chat_template = TURNS + "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    ids, (response,) = Codec(tokenizer).encode([USER], [[SAID]])
    assert ids == Codec(tokenizer).encode([USER])[0] and response[-1] == tokenizer.eos_token_id
    assert response.count(tokenizer.eos_token_id) == 1


def test_a_policy_learns_behind_what_it_will_be_given():
    """Templates that open an answer otherwise than they write one."""
    made = byo.byte_level_bpe()
    made.chat_template = THINKS
    assert split_answer(made, [USER], [SAID]) == ("<s>user\nthe old cat</s>\n<s>assistant\n(thoughts)", "hid</s>\n")
    ids, (response,) = Codec(made).encode([USER], [[SAID]])
    assert ids == Codec(made).encode([USER])[0] and made.decode(response) == "hid</s>"
    echo = {"role": "assistant", "content": "cat"}  # stands in the prompt too
    assert split_answer(made, [USER], [echo])[1] == "cat</s>\n"
    made.chat_template = TURNS.replace("m.content", "m.content if m.role == 'user' else 'else'") + "x"
    with pytest.raises(BadExample, match="differently once it is answered"):
        split_answer(made, [USER], [SAID])


def test_the_end_of_a_turn_ends_a_completion():
    made = byo.byte_level_bpe()
    made.add_special_tokens({"additional_special_tokens": ["<eot>"]})
    made.chat_template = TURNS.replace("</s>", "<eot>")
    (response,) = Codec(made).encode([USER], [[SAID]])[1]
    assert made.decode(response).endswith("hid<eot>")
    made.chat_template = "{{ raise_exception('no chat today') }}"  # which is no matter of texts
    assert made.decode(Codec(made).encode("the old cat", [" hid"])[1][0]) == " hid</s>"


def test_the_fingerprint_is_of_what_decides_the_ids():
    prints = [Codec(make()).fingerprint for make in KINDS.values()]
    assert len(set(prints)) == len(prints) and Codec(metaspace()).fingerprint in prints
    made = metaspace()
    made.chat_template = TURNS
    assert Codec(made).fingerprint not in prints
