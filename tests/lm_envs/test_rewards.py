"""Rewards: what is passed and checked, learned models over the text bridge, compositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lm_envs import rewards
from lm_envs.rewards import Clip, LearnedReward, Standardise, WeightedSum, call_reward

PROMPTS, COMPLETIONS = ["a b", "c"], [" d", " e e"]
IDS, REASONS = [[4, 0], [5, 5, 0]], ["stop", "stop"]


def call(reward, **columns):
    return call_reward(reward, PROMPTS, COMPLETIONS, IDS, REASONS, **columns)


# --- the convention -------------------------------------------------------------------------------------------------


def test_a_reward_gets_what_it_names():
    seen = {}

    def trl_style(completions, **kwargs):
        seen.update(kwargs)
        return [1, 2]

    def short(prompts, completions):
        return [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]

    assert call(trl_style, label=[7, 8]).tolist() == [1.0, 2.0]
    assert seen == {"prompts": PROMPTS, "completion_ids": IDS, "finish_reasons": REASONS, "label": [7, 8]}
    assert call(short).tolist() == [5.0, 5.0]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, requires_grad=True)])
def test_any_sequence_of_numbers_will_do(kind):
    found = call(lambda completions: kind([0.5, -1.0]))
    assert found.dtype == np.float64 and found.tolist() == [0.5, -1.0]


def test_dense_rewards_stop_with_their_response():
    for given in ([[1, 2, np.nan], [3, 4, 5]], [[1, 2], [3, 4, 5]], torch.tensor([[1, 2, 9], [3, 4, 5]])):
        assert call(lambda completions, given=given: given).tolist() == [[1, 2, 0], [3, 4, 5]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "'judge' returned 1 rewards for 2 samples"),
        ([1.0, 2.0, 3.0], "'judge' returned 3 rewards for 2 samples"),
        (1.0, "'judge' returned a float, not a list"),
        ([1.0, float("nan")], r"'judge' returned nan for sample 1 \(prompt 'c', completion ' e e'\)"),
        ([-float("inf"), 1.0], r"'judge' returned -inf for sample 0 \(prompt 'a b', completion ' d'\)"),
        ([None, 1.0], r"'judge' returned None for sample 0 \(prompt 'a b'"),
        (["good", 1.0], r"'judge' returned 'good' for sample 0 .* not a number"),
        ([1.0, [1.0, 2.0]], r"shape \(2,\) for sample 1 .* expected one number per sample"),
        ([[1.0, 2.0], [1.0, 2.0]], "returned 2 values for the 3 tokens of sample 1"),
        ([[1.0, 2.0], [1.0, float("inf"), 2.0]], "returned inf for sample 1"),
    ],
)
def test_bad_results_name_the_reward_and_the_sample(returned, message):
    def judge(completions):
        return returned

    with pytest.raises(ValueError, match=message) as found:
        call(judge)
    assert "\n" not in str(found.value)


def test_long_texts_are_shortened_in_messages():
    with pytest.raises(ValueError, match=r"\.\.\.'") as found:
        call_reward(lambda completions: [np.nan], ["p" * 500], ["c"], [[1]], ["stop"])
    assert len(str(found.value)) < 300


# --- compositions ---------------------------------------------------------------------------------------------------


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def per_token(completion_ids, **columns):
    return [[1.0] * len(ids) for ids in completion_ids]


def test_weighted_sum():
    both = WeightedSum([(2.0, length), (-0.5, length)])
    assert both.__name__ == "2*length + -0.5*length"
    assert call(both).tolist() == [3.0, 6.0]


def test_in_a_weighted_sum_with_a_dense_part_the_score_lands_on_the_last_token():
    assert call(WeightedSum([(1.0, length), (10.0, per_token)])).tolist() == [[10, 12, 0], [10, 10, 14]]


def test_clip():
    reward = Clip(length, -1, 3)
    assert reward.__name__ == "clip(length, -1, 3)" and call(reward).tolist() == [2.0, 3.0]
    assert call(Clip(per_token, -1, 0.5)).tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0.5]]
    with pytest.raises(ValueError, match="low < high"):
        Clip(length, 1, 1)


def test_standardise_against_the_reference():
    samples = dict(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS, finish_reasons=REASONS)
    reward = Standardise.against(length, **samples)
    assert reward.__name__ == "standardise(length)" and (reward.mean, reward.std) == (3.0, 1.0)
    assert call(reward).tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match="'per_token' is dense"):
        Standardise.against(per_token, **samples)
    with pytest.raises(ValueError, match="'per_token' is dense"):
        call(Standardise(per_token, 0, 1))
    with pytest.raises(ValueError, match="positive std"):
        Standardise.against(lambda completions: [1.0, 1.0], **samples)


def test_a_fault_inside_a_composition_names_the_part():
    def broken(completions):
        return [float("nan"), 0.0]

    with pytest.raises(ValueError, match="reward 'broken' returned nan"):
        call(Clip(WeightedSum([(1.0, length), (1.0, broken)]), -1, 1))


# --- learned rewards ------------------------------------------------------------------------------------------------

WORDS = ["<eos>", "<bos>", "<unk>", *"abcdefgh"]


def words(eos="<eos>", pad="<eos>", template=None, **special) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(word, WORDS.index(word)) for word in ("<bos>", "<eos>")]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, pad_token=pad, **special)


def classifier(kind: str, labels: int = 1, pad: int | None = 0, context: int = 16):
    sizes = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=labels)
    # Dropout is on in the config on purpose: a reward must not use it.
    config = {
        "GPT2": lambda: transformers.GPT2Config(n_positions=context, initializer_range=0.3, resid_pdrop=0.5, **sizes),
        "Llama": lambda: transformers.LlamaConfig(
            max_position_embeddings=context, intermediate_size=24, initializer_range=0.3, **sizes
        ),
        "GPTNeoX": lambda: transformers.GPTNeoXConfig(
            max_position_embeddings=context, intermediate_size=24, initializer_range=0.3, hidden_dropout=0.5, **sizes
        ),
        "Bert": lambda: transformers.BertConfig(
            max_position_embeddings=context, intermediate_size=24, initializer_range=0.3, **sizes
        ),
    }[kind]()
    config.pad_token_id = pad
    config.bos_token_id = config.eos_token_id = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForSequenceClassification")(config)


TEXTS = ["a b c", "d", "e f g h a", "b b"]


def alone(model, ids) -> float:
    """The model's logit at the last token of one unpadded text, by its stock forward where nothing is padding."""
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state
        return model.score(hidden[0, -1]).item()


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "GPTNeoX"])
@pytest.mark.parametrize("pad", [0, None])
def test_decoder_heads_read_the_last_real_token_whatever_the_pad_id(kind, pad):
    model, tokenizer = classifier(kind, pad=pad), words(pad="<eos>" if pad == 0 else None)
    reward = LearnedReward(model, tokenizer, batch_size=3)
    stopped = reward([""] * 4, TEXTS, ["stop"] * 4)
    cut = reward([""] * 4, TEXTS, ["length"] * 4)
    for text, with_eos, without in zip(TEXTS, stopped, cut, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert with_eos == pytest.approx(alone(model, [*ids, 0]), abs=1e-5)
        assert without == pytest.approx(alone(model, ids), abs=1e-5)
        assert abs(with_eos - without) > 1e-3


def test_the_stock_head_skips_an_eos_that_equals_pad():
    """The negative control: what pooling by pad id would have given is another number."""
    model, tokenizer = classifier("GPT2"), words()
    model.eval()
    ids = [*tokenizer("a b c")["input_ids"], 0]
    with torch.no_grad():
        stock = model(torch.tensor([ids])).logits.item()
    ours = LearnedReward(model, tokenizer)(["a b"], [" c"], ["stop"])[0]
    assert stock == pytest.approx(alone(model, ids[:-1]), abs=1e-5)
    assert abs(ours - stock) > 1e-3


def test_one_text_scores_the_same_in_any_company():
    model, tokenizer = classifier("GPTNeoX"), words()
    together = LearnedReward(model, tokenizer, batch_size=4)(["a b"] * 4, TEXTS)
    for batch_size in (1, 2, 3):
        assert LearnedReward(model, tokenizer, batch_size=batch_size)(["a b"] * 4, TEXTS) == pytest.approx(
            together, abs=1e-5
        )


def test_an_eos_that_the_tokenizer_adds_itself_is_taken_off_and_bos_stays():
    tokenizer = words(template="<bos> $A <eos>", bos_token="<bos>")
    assert rewards.encode_text(tokenizer, "a b", stopped=True) == [1, 3, 4, 0]
    assert rewards.encode_text(tokenizer, "a b", stopped=False) == [1, 3, 4]
    assert rewards.encode_text(tokenizer, "a b", stopped=False, append_eos=False) == [1, 3, 4, 0]


def test_encoders_read_the_text_as_their_tokenizer_wraps_it():
    model, tokenizer = classifier("Bert"), words(template="<bos> $A <eos>", bos_token="<bos>")
    found = LearnedReward(model, tokenizer)(["a"] * 2, [" b", " c d e"], ["stop", "length"])
    with torch.no_grad():
        expected = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits.item() for text in ("a b", "a c d e")]
    assert found == pytest.approx(expected, abs=1e-5)


def test_two_labels_give_log_odds():
    model, tokenizer = classifier("Llama", labels=2), words()
    ids = tokenizer("a b c")["input_ids"]
    with torch.no_grad():
        hidden = model.eval().base_model(torch.tensor([ids])).last_hidden_state
        log_p = model.score(hidden[0, -1]).log_softmax(-1)
    assert LearnedReward(model, tokenizer)(["a b"], [" c"], ["length"])[0] == pytest.approx(
        (log_p[1] - log_p[0]).item(), abs=1e-5
    )


def test_other_numbers_of_labels_are_refused():
    with pytest.raises(ValueError, match="has 3 labels: a reward needs one .* or two"):
        LearnedReward(classifier("GPT2", labels=3), words())


def test_normalise():
    model, tokenizer = classifier("GPT2"), words()
    raw = np.array(LearnedReward(model, tokenizer)([""] * 4, TEXTS))
    scaled = LearnedReward(model, tokenizer, normalise=(raw.mean(), raw.std()), name="scaled")
    values = np.array(scaled([""] * 4, TEXTS))
    assert values.mean() == pytest.approx(0, abs=1e-6) and values.std() == pytest.approx(1)
    assert scaled.__name__ == "scaled"
    for bad in ((0, 0), (0, -1), (float("nan"), 1)):
        with pytest.raises(ValueError, match="positive std"):
            LearnedReward(model, tokenizer, normalise=bad)


def test_a_text_longer_than_the_context_loses_the_start_of_its_prompt():
    model = classifier("Llama", context=6)
    tokenizer = words(template="<bos> $A", bos_token="<bos>")
    reward = LearnedReward(model, tokenizer)
    with pytest.warns(UserWarning, match="reads 6 tokens: of longer texts it does not see the start"):
        found = reward(["a a a a a"], [" b c d"], ["stop"])[0]
    assert found == pytest.approx(alone(model, [1, 3, 4, 5, 6, 0]), abs=1e-5)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="'reward_model': text '' has no tokens"):
        LearnedReward(classifier("GPT2"), words())([""], [""], ["length"])


def test_dropout_is_off_and_gradients_flow_only_when_asked():
    model, tokenizer = classifier("GPT2"), words()
    model.train()
    reward = LearnedReward(model, tokenizer)
    assert reward(["a"], [" b"]) == reward(["a"], [" b"])
    rewards.raw_scores(model, torch.tensor([[3, 4, -1]])).sum().backward()
    assert model.score.weight.grad.abs().sum() > 0
