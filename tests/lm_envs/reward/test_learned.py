"""Learned reward models over the text bridge: what they read, where they pool, which label scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lm_envs.model.tokens import context_of, encode_text
from lm_envs.reward.learned import LearnedReward, raw_scores

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
    assert encode_text(tokenizer, "a b", stopped=True) == [1, 3, 4, 0]
    assert encode_text(tokenizer, "a b", stopped=False) == [1, 3, 4]
    assert encode_text(tokenizer, "a b", stopped=False, append_eos=False) == [1, 3, 4, 0]


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


def test_of_more_labels_one_must_be_named():
    with pytest.raises(ValueError, match=r"has 3 labels: a reward needs one .* or two .* 0 \(LABEL_0\), 1"):
        LearnedReward(classifier("GPT2", labels=3), words())


@pytest.mark.parametrize("kind", ["GPT2", "Bert"])
@pytest.mark.parametrize("independent", [False, True])
def test_a_label_and_how_its_score_is_read(kind, independent):
    """Against the stock forward of one text: softmax over the labels, or a sigmoid of each."""
    model, tokenizer = classifier(kind, labels=3, pad=None), words()
    model.config.id2label = {0: "negative", 1: "neutral", 2: "positive"}
    model.config.problem_type = "multi_label_classification" if independent else None
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokenizer("a b c")["input_ids"]])).logits[0].double()
    p = logits.sigmoid() if independent else logits.softmax(-1)

    def score(**options):
        return LearnedReward(model, tokenizer, **options)(["a b"], [" c"], ["length"])[0]

    for label, k in ((2, 2), ("Positive", 2), ("negative", 0), ("1", 1)):
        assert score(label=label) == pytest.approx((p[k] / (1 - p[k])).log().item(), abs=1e-5)
        assert score(label=label, output="probability") == pytest.approx(p[k].item(), abs=1e-6)
        assert score(label=label, output="logit") == pytest.approx(logits[k].item(), abs=1e-5)
    for bad in ("happy", 3, -1, "3"):
        with pytest.raises(ValueError, match=r"has no label .*: it has 0 \(negative\), 1 \(neutral\), 2 \(positive\)"):
            score(label=bad)
    with pytest.raises(ValueError, match="output must be one of log_odds"):
        score(label=0, output="percent")


def test_of_two_labels_the_first_is_the_second_reversed():
    model, tokenizer = classifier("Llama", labels=2), words()
    first, second = (LearnedReward(model, tokenizer, label=k)(["a"], [" b"])[0] for k in (0, 1))
    assert first == pytest.approx(-second, abs=1e-6)
    assert second == LearnedReward(model, tokenizer)(["a"], [" b"])[0]
    assert LearnedReward(model, tokenizer, label=1).is_plain and not LearnedReward(model, tokenizer, label=0).is_plain
    one = LearnedReward(classifier("GPT2"), tokenizer, output="probability")
    assert 0 < one(["a"], [" b"])[0] < 1 and not one.is_plain


def test_a_chat_template_writes_the_conversation():
    model, tokenizer = classifier("Llama", context=64), words()
    with pytest.raises(ValueError, match="no chat template"):
        LearnedReward(model, tokenizer, template="chat")
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ 'g ' if m['role'] == 'user' else 'h ' }}{{ m['content'] }}{{ ' <eos> ' }}"
        "{% endfor %}"
    )
    reward = LearnedReward(model, tokenizer, template="chat")
    ids = {word: i for i, word in enumerate(WORDS)}
    user, assistant = [ids["g"], ids["a"], ids["b"], 0], [ids["h"], ids["c"]]
    found = reward(["a b"] * 2, ["c"] * 2, ["stop", "length"])
    assert found[0] == pytest.approx(alone(model, [*user, *assistant, 0]), abs=1e-5)
    assert found[1] == pytest.approx(alone(model, [*user, *assistant]), abs=1e-5)  # left open
    messages = [
        [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}, {"role": "user", "content": "f"}]
    ]
    longer = [ids["g"], ids["d"], 0, ids["h"], ids["e"], 0, ids["g"], ids["f"], 0, *assistant, 0]
    assert reward(["whatever"], ["c"], messages=messages)[0] == pytest.approx(alone(model, longer), abs=1e-5)
    assert not reward.is_plain


def test_labels_go_by_name_in_any_case_or_by_number():
    model = classifier("Bert", labels=3)
    model.config.id2label = {0: "Bad", 1: "so so", 2: "GOOD"}
    for label, number in (("good", 2), ("BAD", 0), ("1", 1), (0, 0)):
        assert LearnedReward(model, words(), label=label).label == number
    two = classifier("GPT2", labels=2)
    plain = {None: True, 1: True, 0: False}
    assert {label: LearnedReward(two, words(), label=label).is_plain for label in plain} == plain
    for wrong in ("fine", "3", 3, -1):
        with pytest.raises(ValueError, match="has no label"):
            LearnedReward(model, words(), label=wrong)


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
    with pytest.warns(UserWarning, match="reads 6 tokens: it does not see the start of longer texts"):
        found = reward(["a a a a a"], [" b c d"], ["stop"])[0]
    assert found == pytest.approx(alone(model, [1, 3, 4, 5, 6, 0]), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "skipped"),
    [("Roberta", 3), ("XLMRoberta", 3), ("Camembert", 3), ("MPNet", 2), ("Longformer", 3), ("Bert", 0)],
)
def test_models_that_number_positions_from_the_pad_id_read_fewer_tokens(kind, skipped):
    """By hand: of 16 places those up to the pad id, 2 (MPNet's is 1 always), are no token's."""
    sizes = dict(vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    more = {"attention_window": [4]} if kind == "Longformer" else {}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, **more, num_labels=1, max_position_embeddings=16, pad_token_id=2, type_vocab_size=1, bos_token_id=1
    )
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    reward = LearnedReward(model, words(pad="<unk>", template="<eos> $A <eos>"))
    assert reward.context == context_of(model) == 16 - skipped
    letters = [*"abcdefgh" * 3]
    fits, over = " ".join(letters[: 16 - skipped - 2]), " ".join(letters[: 16 - skipped - 1])
    ids = torch.tensor([reward.tokenizer(fits)["input_ids"]])
    assert ids.shape[1] == 16 - skipped
    (score,) = reward([""], [fits])
    assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-6)
    with pytest.warns(UserWarning, match=f"reads {16 - skipped} tokens"):
        (cut,) = reward([""], [over])
    assert np.isfinite(cut)
    with pytest.raises((IndexError, RuntimeError)):  # negative control: one more token has no place
        model(input_ids=torch.tensor([reward.tokenizer(over)["input_ids"]]))


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="'reward_model': text '' has no tokens"):
        LearnedReward(classifier("GPT2"), words())([""], [""], ["length"])


def test_dropout_is_off_and_gradients_flow_only_when_asked():
    model, tokenizer = classifier("GPT2"), words()
    model.train()
    reward = LearnedReward(model, tokenizer)
    assert reward(["a"], [" b"]) == reward(["a"], [" b"])
    raw_scores(model, torch.tensor([[3, 4, -1]])).sum().backward()
    assert model.score.weight.grad.abs().sum() > 0
