"""The text so far for a terminal, each token on a background that shows its share of the KL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lm_envs.printable import printable

if TYPE_CHECKING:
    from lm_envs.env.mdp import TextMDP

_FULL_SCALE = 3.0  # nats: a token this much likelier (or less likely) than under the reference has the strongest color
_LIKELIER = (224, 218, 212, 206)  # 256-color palette, pale to strong: the policy says it more than the reference
_RARER = (195, 153, 117, 75)


def render_text(mdp: TextMDP, obs: NDArray[np.int64], kl: NDArray[np.float64]) -> str:
    """One row for a terminal: prompt in bold, then the response token by token.

    Args:
        obs: ``(P + T,)`` int64, -1 where there is no token.
        kl: ``(T,)`` log pi - log pi_ref of each response token, nats; NaN where unknown (no color).
    """
    prompt, response = (row[row >= 0].tolist() for row in (obs[: mdp.prompt_length], obs[mdp.prompt_length :]))
    decode = mdp.task.tokenizer.decode
    before = decode(prompt)
    parts = [f"\x1b[1m{printable(decode(prompt, skip_special_tokens=True))}\x1b[0m"]
    for i in range(len(response)):
        # Decode the growing text and show what each token added: spaces and byte-level pieces come out right.
        text = decode(prompt + response[: i + 1])
        piece, before = text[len(before) :], text
        parts.append(_colored(printable(piece), kl[i]))
    return "".join(parts)


def _colored(piece: str, kl: float) -> str:
    if np.isnan(kl) or abs(kl) < 0.1:
        return piece
    palette = _LIKELIER if kl > 0 else _RARER
    level = min(int(abs(kl) / _FULL_SCALE * len(palette)), len(palette) - 1)
    return f"\x1b[30;48;5;{palette[level]}m{piece}\x1b[0m"
