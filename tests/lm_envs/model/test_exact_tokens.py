"""Token ids in and out of models, written out: ends, prefixes, room, padding and order."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from lm_envs.model.decoding import GREEDY, greedy
from lm_envs.model.encoder_decoder import decoder_prefix, decoder_tokens, encoder_inputs, room_for, teacher_forced
from lm_envs.model.endings import end_of_turn
from lm_envs.model.forwards import early_eos, response_logprob, rows_at_once
from lm_envs.model.tokens import encode_text, is_eos, left_pad, model_inputs, right_align, right_pad
from lm_envs.reward.learned import initialise_reward_head, reward_start
from tests import tiny
from tests.lm_envs import byo


def bart(**changes):
    config = BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=12, pad_token_id=1,
        eos_token_id=2, bos_token_id=0, decoder_start_token_id=2, forced_eos_token_id=None, forced_bos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    for name, value in changes.items():
        setattr(model.config if name in ("forced_bos_token_id", "decoder_start_token_id") else model, name, value)
    return model


def test_padding_by_hand():
    rows = torch.tensor([[-1, 3, 4, -1], [5, 6, 7, 8], [-1, -1, 9, -1]])
    found = model_inputs(rows)
    assert found["input_ids"].tolist() == [[0, 3, 4, 0], [5, 6, 7, 8], [0, 0, 9, 0]]
    assert found["attention_mask"].tolist() == [[0, 1, 1, 0], [1] * 4, [0, 0, 1, 0]]
    assert found["position_ids"].tolist() == [[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert right_align(rows).tolist() == [[-1, -1, 3, 4], [5, 6, 7, 8], [-1, -1, -1, 9]]
    assert right_align(rows[[0, 2]]).tolist() == [[3, 4], [-1, 9]]
    assert left_pad([[1, 2], [], [3]], 3).tolist() == [[-1, 1, 2], [-1, -1, -1], [-1, -1, 3]]
    assert right_pad([[1, 2], [3]]).tolist() == [[1, 2], [3, -1]]
    with pytest.raises(ValueError, match="row 1 has 3 tokens, more than the 2 places"):
        left_pad([[1], [1, 2, 3]], 2)
    assert is_eos(np.array([1, 2, 3, 4]), (2, 4)).tolist() == [False, True, False, True]


def test_a_reward_models_text_ends_in_one_eos_or_none():
    class Adding:  # two of them behind every text
        eos_token_id = 2

        def __call__(self, text):
            return {"input_ids": [5, 6, 2, 2]}

    assert encode_text(Adding(), "x", True) == [5, 6, 2] and encode_text(Adding(), "x", False) == [5, 6]
    assert encode_text(Adding(), "x", True, append_eos=False) == [5, 6, 2, 2]


def test_an_encoder_decoders_prefix_and_room():
    plain, forced = bart(), bart(forced_bos_token_id=7)
    assert decoder_prefix(plain) == [2] and decoder_prefix(forced) == [2, 7]
    plain.generation_config.forced_bos_token_id = 9  # where the config says nothing
    assert decoder_prefix(plain) == [2, 9]
    assert decoder_tokens(forced, torch.tensor([[3, 4]])).tolist() == [[2, 7, 3, 4]]
    given = teacher_forced(forced, torch.tensor([[-1, 5, 6], [3, 4, 5]]), torch.tensor([[8, 2, -1], [9, 9, 2]]))
    assert given["decoder_input_ids"].tolist() == [[2, 7, 8, 2], [2, 7, 9, 9]]
    assert given["input_ids"].tolist() == [[5, 6, 0], [3, 4, 5]]
    assert encoder_inputs(torch.tensor([[-1, 5, 6], [-1, -1, 4]]))["attention_mask"].tolist() == [[1, 1], [1, 0]]
    # Two tokens stand before a response of 11, and its last token is not read: 12 places.
    assert (
        room_for(forced, 5, 11) == (12, 12)
        and room_for(forced, 30, 11) == (30, 12)
        and room_for(bart(), 5, 11) == (11, 12)
    )
    assert room_for(tiny.gpt2(), 5, 11) == (16, 64)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1))
    with pytest.raises(ValueError, match="does not say which token starts its decoder"):
        decoder_prefix(t5)


def test_the_first_special_token_behind_an_answer_ends_its_turn():
    tokenizer = byo.byte_level_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|end|>x", "<|more|>"]})
    for behind, expected in (("<|more|><|end|>", "<|more|>"), ("\n<|end|>\n</s>", "<|end|>"), ("<|end|>x", "<|end|>x")):
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + behind + "{% endfor %}"
        assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(expected)


def test_greedy_answers_in_the_order_of_their_prompts():
    model, prompts = tiny.gpt2(), [[4, 5, 6], [1], [7, 8, 9, 1], [2, 3], [3]]
    found = greedy(model, prompts, 0, max_new_tokens=4, batch_size=2)
    for prompt, response in zip(prompts, found, strict=True):
        row = []
        while len(row) < 4 and row[-1:] != [0]:
            row.append(int(model(input_ids=torch.tensor([prompt + row])).logits[0, -1].argmax()))
        assert response == row
    assert GREEDY <= 1e-6  # a hundredth of a nat apart, the likelier token is taken 10,000 nats over


def test_log_probabilities_in_batches_are_those_of_rows_alone():
    """Rows of any length, a few at a time, at a temperature, an end masked early, the likeliest tokens alone."""
    model = tiny.gpt2()
    prompt = torch.tensor([[-1, 1, 2], [3, 4, 5], [-1, -1, 6], [-1, 2, 2]])
    response = torch.tensor([[3, 4, 5, 0], [6, 0, -1, -1], [7, 7, 7, -1], [1, -1, -1, -1]])
    settings = {"temperature": 0.7, "min_new_tokens": 1, "top_k": 9}
    for size in (None, 1, 3):
        found = response_logprob(model, prompt, response, 0, **settings, batch_size=size)
        for i in range(4):
            ids, said = prompt[i][prompt[i] >= 0].tolist(), response[i][response[i] >= 0].tolist()
            for t, token in enumerate(said):
                logits = model(input_ids=torch.tensor([ids + said[:t]])).logits[0, -1].clone()
                if t < 1:
                    logits[0] = -torch.inf
                logits[logits < logits.sort(descending=True).values[8]] = -torch.inf
                expected = (logits / 0.7).log_softmax(-1)[token].item()
                assert found[i, t].item() == pytest.approx(expected)
            assert found[i, len(said) :].tolist() == [0] * (4 - len(said))
    assert early_eos(4, 0, 0) is None
    logits = torch.zeros(8, 10)
    early_eos(4, 0, 2)(logits, torch.arange(8))
    assert (logits[:, 0] == -torch.inf).tolist() == [True, True, False, False] * 2
    assert rows_at_once(2000, torch.device("cpu")) == 1 and rows_at_once(100, torch.device("cpu")) == 10


def test_a_reward_models_new_head_is_the_seeds(tmp_path):
    folders = byo.make(tmp_path)
    place = folders.options["policy"]
    expected = nn.Linear(16, 1, bias=False)
    for seed in (3, 4):
        model, tokenizer = reward_start(place, seed=seed)
        initialise_reward_head(expected, torch.Generator().manual_seed(seed))
        assert torch.equal(model.score.weight, expected.weight)
        # Its own BOS pads, so that no head takes a real EOS for padding.
        assert (tokenizer.pad_token, model.config.pad_token_id) == ("<s>", 0)
