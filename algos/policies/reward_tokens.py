"""Reward tokens: tokens before a prompt that say how good the response should be.

They are rows of the *input* embedding alone: ids V, V + 1, ... can be read and never written, so the policy's
distribution stays one over V tokens.
"""

import torch
from torch import Tensor, nn


class ExtendedEmbedding(nn.Module):
    """An input embedding with ``count`` more rows, which start as different from one another as the others are.

    The first V rows are the module that was there, so an output layer tied to it stays tied.

    Args:
        base: ``Embedding(V, d)``, or a module with a ``weight (V, d)`` that embeds ids.
        count: how many rows to add.
    """

    def __init__(self, base: nn.Module, count: int) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, Tensor)
        self.base, self.vocabulary = base, weight.shape[0]
        # A normal draw with the rows' own moments: tokens that start alike take long to mean different things.
        noise = torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(count))
        table = weight.detach()
        self.extra = nn.Parameter(table.mean(dim=0) + table.std(dim=0) * noise.to(table))

    @property
    def weight(self) -> Tensor:
        """``(V, d)``, the rows that the output layer may be tied to."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        """``(..., d)`` of ids below V + count."""
        added = ids >= self.vocabulary
        found = self.base(ids.masked_fill(added, 0))
        if not torch.compiler.is_compiling() and not bool(added.any()):  # a program cannot ask
            return found
        rows = self.extra[(ids - self.vocabulary).clamp(min=0)]
        return torch.where(added.unsqueeze(-1), rows, found)


def prepend(prompt: Tensor, token: Tensor | int) -> Tensor:
    """``(B, P + 1)``: prompts ``(B, P)``, left-padded with -1, with a token (one for all, or ``(B,)``) before their
    first."""
    wide = nn.functional.pad(prompt, (1, 0), value=-1)
    place = (wide < 0).sum(dim=1, keepdim=True) - 1
    tokens = torch.as_tensor(token, dtype=prompt.dtype, device=prompt.device).reshape(-1, 1).expand(len(prompt), 1)
    return wide.scatter(1, place, tokens)


def without_tokens(prompt: Tensor, vocabulary: int) -> Tensor:
    """Remove reward tokens from prompts, which stay left-padded, as wide as before."""
    return prompt.masked_fill(prompt >= vocabulary, -1)
