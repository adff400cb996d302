r"""Where the losses of DPO's family come to rest, on all pairs of the reference's responses with their probabilities.

Annotators prefer y to y' with probability ``p(y > y') = sigmoid(r(y) - r(y'))``, and record the choice the wrong way
round with probability ``flip``. For labels, a response is wanted with the probability that it wins a pair. With
``beta`` the coefficient and ref the distribution of responses,

=====================  ==========================================================================================
loss                    at rest
=====================  ==========================================================================================
sigmoid (DPO), flip 0   ``pi ∝ ref e^{r/beta}``, the optimum (Rafailov et al. 2023, eq. 4)
robust, flip known      the same
ipo                     ``pi ∝ ref e^{E_{y'}[p(y > y')]/beta}``: bounded, whatever the rewards (Azar et al. 2023)
the others              no closed form: :func:`at_rest` descends
=====================  ==========================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lm_envs.exact.solver import Exact


def wins(exact: Exact, flip: float = 0.0) -> Tensor:
    """``(X, L, L)`` probabilities that the first response is recorded as the better one."""
    p = torch.sigmoid(exact.score[:, :, None] - exact.score[:, None, :])
    return (1 - flip) * p + flip * (1 - p)


def ipo_rest(exact: Exact, beta: float) -> Tensor:
    """``(X, L)`` log-probabilities at rest of IPO."""
    log_ref = exact.sequences(exact.log_ref)
    won = (wins(exact) * log_ref.exp()[:, None, :]).sum(dim=2)
    return (log_ref + won / beta).log_softmax(dim=1)


def expected(exact: Exact, log_p: Tensor, loss: str, beta: float, flip: float = 0.0, assumed: float = 0.1) -> Tensor:
    """The expected loss of log-probabilities ``(X, L)``, a scalar: formulas of their own, apart from the library's.

    ``beta`` is the weight of the odds ratio for "orpo"; a "-mean" at the end of a name normalizes by length.
    """
    log_ref = exact.sequences(exact.log_ref)
    ref, length = log_ref.exp(), exact.mask.sum(dim=1)
    if loss == "kto":  # the mismatched responses are the reference's, of which the log-ratio is negative: no baseline
        wanted = (wins(exact, flip) * ref[:, None, :]).sum(dim=2)
        gain = torch.sigmoid(beta * (log_p - log_ref))
        return (ref * (wanted * (1 - gain) + (1 - wanted) * gain)).sum(dim=1).mean()
    each = log_p / length if loss in ("simpo", "orpo") else log_p - log_ref
    if loss.endswith("-mean"):
        each = each / length
    x = each - torch.log(-torch.expm1(each)) if loss == "orpo" else each
    m = x[:, :, None] - x[:, None, :]
    losses = {
        "sigmoid": lambda m: -F.logsigmoid(beta * m),
        "ipo": lambda m: (m - 1 / (2 * beta)) ** 2,
        "cdpo": lambda m: -(1 - assumed) * F.logsigmoid(beta * m) - assumed * F.logsigmoid(-beta * m),
        "robust": lambda m: (
            (-(1 - assumed) * F.logsigmoid(beta * m) + assumed * F.logsigmoid(-beta * m)) / (1 - 2 * assumed)
        ),
        "simpo": lambda m: -F.logsigmoid(beta * m - 1.0),
        "orpo": lambda m: -beta * F.logsigmoid(m),
    }[loss.removesuffix("-mean")](m)
    if loss == "orpo":
        losses = losses - each[:, :, None]
    chosen = ref[:, :, None] * ref[:, None, :] * 2 * wins(exact, flip)  # of an unordered pair, the winner first
    return (chosen * losses).sum(dim=(1, 2)).mean()


def at_rest(exact: Exact, loss: str, beta: float, flip: float = 0.0, assumed: float = 0.1) -> Tensor:
    """``(X, L)`` log-probabilities that the expected loss is smallest for, from the reference by L-BFGS."""
    logits = exact.sequences(exact.log_ref).clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = expected(exact, logits.log_softmax(dim=1), loss, beta, flip, assumed)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.log_softmax(dim=1).detach()
