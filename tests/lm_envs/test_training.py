"""The supervised losses by hand, and the loop: deterministic, budgeted, honest about divergence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2ForSequenceClassification

from lm_envs import training
from lm_envs.reward.learned import initialise_reward_head
from lm_envs.training import bradley_terry_loss, next_token_loss
from tests.house import CHECKOUT, modules
from tests.tiny import gpt2


def test_next_token_loss_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    found = next_token_loss(logits, torch.tensor([[1, 2]]))
    assert found.item() == pytest.approx(-(math.log(0.25) + math.log(0.8)) / 2)


def test_what_stands_in_padding_changes_neither_loss_nor_gradient():
    targets = torch.tensor([[1, -1], [0, 2]])
    clean = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    grads = []
    for dirt in (0.0, float("nan")):
        logits = clean.clone()
        logits[0, 1] = dirt
        logits.requires_grad_(True)
        loss = next_token_loss(logits, targets)
        loss.backward()
        grads.append((loss.item(), logits.grad.tolist()))
    assert grads[0] == grads[1]


def test_a_batch_without_targets_costs_nothing():
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    loss = next_token_loss(logits, torch.full((1, 2), -1))
    loss.backward()
    assert loss.item() == 0


def test_float64_scores_keep_their_digits():
    scores = torch.tensor([[1.0, 1.0 + 1e-10]], dtype=torch.float64)
    expected = math.log1p(math.exp(-1e-10))  # log 2 - 5e-11
    found = bradley_terry_loss(scores, torch.tensor([[1, 0]]))
    assert found.dtype == torch.float64 and abs(found.item() - expected) < 1e-15
    assert abs(found.item() - math.log(2)) > 4e-11
    assert next_token_loss(scores, torch.tensor([1])).dtype == torch.float64
    assert bradley_terry_loss(scores.bfloat16(), torch.tensor([[1, 0]])).dtype == torch.float32


def test_bradley_terry_of_a_pair_by_hand():
    scores = torch.tensor([[1.0, 3.0], [0.5, -0.5]])
    rank = torch.tensor([[1, 0], [1, 0]])
    expected = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(1.0))) / 2
    assert bradley_terry_loss(scores, rank).item() == pytest.approx(expected)
    assert bradley_terry_loss(scores * 0, rank).item() == pytest.approx(math.log(2))


def test_a_prompt_counts_once_whatever_its_number_of_pairs():
    four = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    rank = torch.arange(4)[None]
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    expected = np.mean([math.log1p(math.exp(-(four[0, i] - four[0, j]).item())) for i, j in pairs])
    assert bradley_terry_loss(four, rank).item() == pytest.approx(expected, rel=1e-6)
    # A second prompt of one pair weighs as much as the six pairs of the first.
    both = bradley_terry_loss(
        torch.cat([four, torch.tensor([[5.0, 0.0, 9.0, 9.0]])]), torch.cat([rank, torch.tensor([[0, 1, -1, -1]])])
    )
    assert both.item() == pytest.approx((expected + math.log1p(math.exp(-5.0))) / 2, rel=1e-6)


def test_ties_and_absent_samples_make_no_pair():
    scores = torch.tensor([[1.0, 2.0, float("nan")]], requires_grad=True)
    loss = bradley_terry_loss(scores, torch.tensor([[0, 0, -1]]))
    assert loss.item() == 0
    loss = bradley_terry_loss(scores, torch.tensor([[0, 1, -1]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(1.0))) and scores.grad[0, 2] == 0


def test_batches_visit_every_example_once_an_epoch_and_depend_on_the_seed_alone():
    def first(count, seed):
        found = training.stream(10, 3, seed, rest=False)
        return [next(found).tolist() for _ in range(count)]

    epochs = first(6, 0)
    for epoch in (epochs[:3], epochs[3:]):
        assert len({i for batch in epoch for i in batch}) == 9
    assert epochs[:3] != epochs[3:]
    assert first(6, 0) == epochs and first(6, 1) != epochs
    seen = []
    training.fit(nn.Linear(1, 1), lambda rows: seen.append(rows) or torch.zeros((), requires_grad=True), 2, **TWO)
    assert [sorted(rows) for rows in seen] == [[0, 1], [0, 1]]  # a batch is no larger than there are examples


TWO = {"steps": 2, "batch_size": 5, "learning_rate": 0.1}


def test_bundles_stay_together_and_their_examples_are_what_the_loss_gets():
    """With one bundle a step the order of bundles is that of the stream, whatever they hold."""
    bundles, seen = [[4, 0], [1], [3, 2, 5]], []
    zero = torch.zeros((), requires_grad=True)
    training.fit(nn.Linear(1, 1), lambda rows: seen.append(rows) or zero * 1, bundles, steps=6, learning_rate=0.1)
    order = [int(chosen[0]) for chosen, _ in zip(training.stream(3, 1, 0), range(6), strict=False)]
    assert seen == [bundles[i] for i in order] and sorted(order[:3]) == sorted(order[3:]) == [0, 1, 2]


def test_a_losss_parts_add_up_and_none_is_taken_before_the_last_ones_graph_is_gone():
    """d/dw of 3w^2 and of 4w at w = 2: 12 and 4."""
    weight, seen = nn.Parameter(torch.tensor(2.0)), []

    def parts():
        for part in (lambda: 3 * weight**2, lambda: 4 * weight):
            seen.append(None if weight.grad is None else weight.grad.item())
            yield part()

    assert training.add_gradients(parts()) == 20.0
    assert weight.grad.item() == 16.0 and seen == [None, 12.0]
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        training.add_gradients([weight * math.nan])
    assert weight.grad.item() == 16.0  # the part that is NaN has left it alone


def test_gradients_are_taken_in_one_place():
    """The agent, its demonstrations and the supervised loop add them up there; expected gradients take no step."""
    found = {str(path.relative_to(CHECKOUT)) for path in modules(CHECKOUT) if ".backward()" in path.read_text()}
    assert {name for name in found if not name.startswith("benchmarks/speed")} == {
        "lm_envs/training.py",
        "algos/engine/exact_gradients.py",
    }


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    model = nn.Linear(1, 1)
    before = model.weight.clone()
    bad = lambda rows: (model.weight * 0).sum().sqrt()  # noqa: E731  0 with an infinite slope
    with pytest.raises(ValueError, match="the gradient's norm is .* at step 1: try a lower learning rate"):
        training.fit(model, bad, 1, steps=1, learning_rate=0.1)
    assert torch.equal(model.weight, before)


def quadratic(steps, **options):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    seen = []
    losses = training.fit(
        model,
        lambda chosen: ((model.weight - 1.0) ** 2).sum(),
        4,
        steps=steps,
        batch_size=2,
        progress=lambda step, loss: seen.append(step),
        **options,
    )
    return model.weight.item(), losses, seen


def test_the_loop_takes_the_steps_it_was_given():
    weight, losses, seen = quadratic(50, learning_rate=0.1)
    assert seen == list(range(1, 51)) and len(losses) == 50
    assert abs(weight - 1) < 0.1 and losses[-1] < losses[0]


def test_the_learning_rate_rises_and_falls():
    # Adam's first steps are as long as the learning rate where the gradient keeps its sign.
    assert quadratic(1, learning_rate=0.01)[0] == pytest.approx(0.01, rel=1e-3)
    half_warm = quadratic(2, learning_rate=0.01, warmup=1.0)[0]
    assert half_warm == pytest.approx(0.005 + 0.01, rel=1e-2)
    decaying = quadratic(4, learning_rate=0.01, warmup=0.25)[0]
    assert decaying == pytest.approx(0.01 * (1 + 1 + 2 / 3 + 1 / 3), rel=2e-2)


def test_weight_decay_and_the_norm_limit_are_used():
    assert quadratic(20, learning_rate=0.1, weight_decay=1.0)[0] < quadratic(20, learning_rate=0.1)[0]
    # Adam is blind to the gradient's scale but for its epsilon.
    assert quadratic(1, learning_rate=0.1, max_grad_norm=1e-12)[0] < 1e-3


def test_the_loop_is_adamw_by_hand():
    """Two parameters pulled to 3 and -2 with other strengths; warm-up over two of eight steps, then a fall to 0."""
    rate, decay, most, strength, goal = 0.05, 0.4, 1.5, (4.0, 0.02), (3.0, -2.0)
    model, told = nn.Linear(2, 1, bias=False).double(), []
    nn.init.zeros_(model.weight)

    def loss(chosen):
        pull = torch.tensor(strength, dtype=torch.float64)
        return (pull * (model.weight[0] - torch.tensor(goal, dtype=torch.float64)) ** 2).sum()

    settings = {"steps": 8, "learning_rate": rate, "weight_decay": decay, "max_grad_norm": most, "warmup": 0.25}
    losses = training.fit(model, loss, 3, **settings, progress=lambda step, value: told.append((step, value)))
    w, m, v, expected = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], []
    for step in range(8):
        expected.append(sum(k * (x - g) ** 2 for k, x, g in zip(strength, w, goal, strict=True)))
        gradient = [2 * k * (x - g) for k, x, g in zip(strength, w, goal, strict=True)]
        norm = math.hypot(*gradient)
        size = rate * min((step + 1) / 2, (8 - step) / 6)
        for i in range(2):
            g = gradient[i] * min(1.0, most / (norm + 1e-6))
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g
            update = m[i] / (1 - 0.9 ** (step + 1)) / (math.sqrt(v[i] / (1 - 0.95 ** (step + 1))) + 1e-8)
            w[i] -= size * (decay * w[i] + update)
    assert model.weight[0].tolist() == pytest.approx(w, rel=1e-9)
    assert losses == pytest.approx(expected, rel=1e-9) and told == list(enumerate(losses, 1))
    defaults = training.fit.__kwdefaults__
    assert {name: defaults[name] for name in ("weight_decay", "max_grad_norm", "warmup")} == {
        "weight_decay": 0.0, "max_grad_norm": 1.0, "warmup": 0.1
    }  # fmt: skip


def test_bad_settings_and_divergence_are_refused():
    with pytest.raises(ValueError, match="steps and a batch size of at least 1, got 4, 0 and 2"):
        quadratic(0, learning_rate=0.1)
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="loss is nan at step 1: try a lower learning rate"):
        training.fit(
            model,
            lambda chosen: model.weight.sum() * float("nan"),
            1,
            steps=1,
            batch_size=1,
            learning_rate=0.1,
        )


TEXTS = [[1, 2, 3, 0], [4, 5, 6, 7, 8, 0], [9, 1, 0], [2, 2, 2, 2, 0]]


def trained():
    model = gpt2(dtype=torch.float32).requires_grad_(True)
    losses = training.fit_language_model(model, TEXTS, steps=40, batch_size=4, learning_rate=1e-2, seed=0)
    return model, losses


def test_a_language_model_learns_its_texts_and_the_eos_bit_for_bit_alike():
    model, losses = trained()
    assert losses[0] > 2 and losses[-1] < 0.7 * losses[0]
    again, same = trained()
    assert losses == same
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        assert model(torch.tensor([[4, 5, 6, 7, 8]])).logits[0, -1].argmax() == 0


def test_a_reward_model_learns_an_order_that_only_the_last_token_tells():
    """Pad equals EOS: a head pooled by pad id could not tell a stopped text from a cut one, and would stay at log 2."""
    config = gpt2().config
    config.num_labels, config.pad_token_id = 1, 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2ForSequenceClassification(config)
    initialise_reward_head(model.score, torch.Generator().manual_seed(0))
    groups = [[text, text[:-1]] for text in TEXTS]
    rank = np.array([[0, 1]] * len(TEXTS))
    losses = training.fit_reward_model(model, groups, rank, steps=40, batch_size=4, learning_rate=1e-2, seed=0)
    assert losses[-1] < 0.1


def test_the_heads_initial_weights():
    head = nn.Linear(399, 50)
    initialise_reward_head(head, torch.Generator().manual_seed(0))
    assert head.weight.std().item() == pytest.approx(1 / 20, rel=0.03) and not head.bias.any()
