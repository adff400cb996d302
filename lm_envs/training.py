"""Supervised learning: two losses, the stream of indices, the optimizer step, and a deterministic loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lm_envs.model.forwards import response_forward
from lm_envs.model.tokens import right_pad
from lm_envs.reward.learned import raw_scores

Progress = Callable[[int, float], None]


def at_least_float32(x: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy ``-mean log p(target)`` over the targets that are present.

    Args:
        logits: ``(..., V)``; position t predicts ``targets[..., t]``.
        targets: ``(...)`` int64; negative where there is none.
    """
    present = targets >= 0
    if not bool(present.any()):
        return logits.sum() * 0.0
    # Selecting first keeps NaN in padded places out of the loss and its gradient.
    return F.cross_entropy(at_least_float32(logits[present]), targets[present])


def bradley_terry_loss(scores: Tensor, rank: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return ``-mean log sigmoid(score_i - score_j)`` over all pairs of a group in which i is ranked before j (Bradley
    and Terry 1952); arguments and mean are those of :func:`mean_over_pairs`."""
    return mean_over_pairs(scores, rank, lambda margin: -F.logsigmoid(margin), weight)


def mean_over_pairs(
    scores: Tensor, rank: Tensor, loss: Callable[[Tensor], Tensor], weight: Tensor | None = None
) -> Tensor:
    """Return the mean of ``loss(score_i - score_j)`` over all pairs of a group in which i is ranked before j.

    As in Ouyang et al. 2022 (InstructGPT, eq. 1) the K-choose-2 pairs of one prompt stay in one batch element and weigh
    ``1 / (K choose 2)`` each, so a prompt counts once for any K. The mean is over groups with a pair; 0 if there are
    none.

    Args:
        scores: ``(B, K)``.
        rank: ``(B, K)`` int64, 0 is best; equal ranks make no pair, negative ranks mark absent samples.
        loss: elementwise.
        weight: ``(B,)`` by which a group's loss is multiplied; the mean still is over the number of groups.
    """
    here = rank >= 0
    better = (rank[:, :, None] < rank[:, None, :]) & here[:, :, None] & here[:, None, :]
    i, j = better.nonzero(as_tuple=True)[1:]
    group = better.nonzero(as_tuple=True)[0]
    scores = at_least_float32(scores)
    losses = loss(scores[group, i] - scores[group, j])
    pairs = better.sum(dim=(1, 2))
    weights = (1.0 if weight is None else weight[group].to(losses.dtype)) / pairs[group].to(losses.dtype)
    return (losses * weights).sum() / max(int((pairs > 0).sum()), 1)


def stream(count: int, size: int, seed: int, start: int = 0, *, rest: bool = True) -> Iterator[NDArray[np.int64]]:
    """Yield endless batches of ``size`` indices below ``count``, from batch number ``start`` on.

    Each pass is a permutation that depends on the seed and the pass alone, so a stream can start in the middle. With
    ``rest`` a batch may span two passes; without it, a pass leaves out the last ``count % size`` indices of its order.
    """
    each = count if rest else count - count % size
    held, order = -1, np.empty(0, dtype=np.int64)
    for number in itertools.count(start):
        batch = np.empty(size, dtype=np.int64)
        for i, place in enumerate(range(number * size, (number + 1) * size)):
            if place // each != held:
                held = place // each
                order = np.random.default_rng((seed, held)).permutation(count)
            batch[i] = order[place % each]
        yield batch


def add_gradients(losses: Iterable[Tensor]) -> float:
    """Add up the gradients of a loss that is given in parts, one part's graph at a time, and return the loss.

    Raises:
        FloatingPointError: a part is NaN or infinite.
    """
    total = 0.0
    for loss in losses:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}")
        loss.backward()
        total += value
    return total


def take_step(
    optimizer: torch.optim.Optimizer,
    parameters: Collection[nn.Parameter],
    max_grad_norm: float,
    of_all: Callable[[Tensor], Tensor] = lambda norm: norm,
) -> Tensor:
    """Clip the gradients to a norm of ``max_grad_norm``, step, and return the norm before; FloatingPointError without a
    step if it is NaN or infinite. ``of_all`` is the norm of all processes' gradients, from that of these."""
    norm = of_all(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    if not math.isfinite(float(norm)):
        raise FloatingPointError(f"the gradient's norm is {float(norm)}")
    optimizer.step()
    return norm


def fit(
    model: nn.Module,
    loss: Callable[[list[int]], Tensor],
    examples: int | Sequence[Sequence[int]],
    *,
    steps: int,
    batch_size: int = 1,
    learning_rate: float,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    warmup: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Minimize a loss by AdamW without dropout, a function of the arguments; return the loss of every step.

    The learning rate rises linearly over the fraction ``warmup`` of the steps and then falls linearly to 0. ValueError
    without examples or steps, or if the loss or its gradient stops being finite.

    Args:
        model: its parameters with ``requires_grad`` are trained.
        loss: maps the indices of a batch's examples to a scalar.
        examples: their number, or bundles of their indices, which stay together.
        batch_size: examples or bundles per step.
        progress: called after each step with its number, from 1, and its loss.
    """
    count = examples if isinstance(examples, int) else len(examples)
    if count < 1 or steps < 1 or batch_size < 1:
        raise ValueError(f"need examples, steps and a batch size of at least 1, got {count}, {steps} and {batch_size}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, eps=1e-8, betas=(0.9, 0.95))
    rising = max(1, round(warmup * steps))
    model.eval()
    losses: list[float] = []
    for step, chosen in zip(range(steps), stream(count, min(batch_size, count), seed, rest=False), strict=False):
        rate = min((step + 1) / rising, (steps - step) / max(1, steps - rising))
        optimizer.param_groups[0]["lr"] = learning_rate * rate
        rows = chosen.tolist()
        rows = rows if isinstance(examples, int) else [i for bundle in rows for i in examples[bundle]]
        optimizer.zero_grad(set_to_none=True)
        try:
            losses.append(add_gradients([loss(rows)]))
            take_step(optimizer, parameters, max_grad_norm)
        except FloatingPointError as error:
            raise ValueError(f"{error} at step {step + 1}: try a lower learning rate") from None
        if progress is not None:
            progress(step + 1, losses[-1])
    return losses


def fit_language_model(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    bundles: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> list[float]:
    """Train a causal LM on texts (token ids, at least two each, with EOS if it is to be learned) by next-token
    cross-entropy, the mean over a batch's tokens; ``bundles`` and options as for :func:`fit`."""

    def loss(chosen: list[int]) -> Tensor:
        ids = right_pad([texts[i] for i in chosen]).to(model.device)
        targets = ids[:, 1:]
        now = response_forward(model, ids[:, :1], targets)
        if now.head is None:
            return next_token_loss(now.logits(), targets)
        return now.head.nll(now.hidden, targets.clamp(min=0), targets >= 0)

    return fit(model, loss, len(texts) if bundles is None else bundles, **options)


def fit_reward_model(
    model: PreTrainedModel, groups: Sequence[Sequence[Sequence[int]]], rank: NDArray[np.int64], **options: Any
) -> list[float]:
    """Train a one-label sequence-classification model by :func:`bradley_terry_loss` on N groups of K texts, token ids,
    with ranks ``(N, K)`` int64, 0 is best; options as for :func:`fit`, ``batch_size`` in groups."""

    def loss(chosen: list[int]) -> Tensor:
        ids = right_pad([text for i in chosen for text in groups[i]]).to(model.device)
        scores = raw_scores(model, ids).view(len(chosen), -1)
        return bradley_terry_loss(scores, torch.as_tensor(rank[chosen], device=scores.device))

    return fit(model, loss, len(groups), **options)
