"""What the builders of tasks share: checking options, progress bars, small models, and samples of a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import GPT2Config

from lm_envs import rng
from lm_envs.model.decoding import generate
from lm_envs.model.text import Codec
from lm_envs.model.tokens import EosIds, eos_ids, left_pad
from lm_envs.reward.units import Samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model = TypeVar("Model", bound="PreTrainedModel")

# Samples that make a task take their random numbers from episodes that no training run reaches.
SAMPLE_EPISODES = 2**40


def progress_bar() -> Progress:
    """A progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(emoji=False, stderr=True))


def line_of(bar: Progress, description: str, total: int) -> Callable[..., None]:
    """Add a line to a bar; call the result with how much is done (and a loss, which is not shown)."""
    line = bar.add_task(description, total=total)

    def update(done: int, loss: float = 0.0) -> None:
        bar.update(line, completed=done)

    return update


def small_gpt2(
    kind: type[Model],
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
    hidden: int,
    layers: int,
    heads: int,
    seed: int,
) -> Model:
    """Return a GPT-2 with weights drawn from the seed; the caller's global generator is left as it was."""
    eos = tokenizer.eos_token_id
    architecture = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        activation_function="relu",  # the cheapest on a CPU
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        num_labels=1,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(architecture).eval()


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    eos_token_id: EosIds,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    repeats: int = 1,
) -> Samples:
    """``count`` responses, ``repeats`` in a row to a prompt, the prompts taking turns; a function of its arguments.

    Args:
        prompts: token ids without padding.
        first: number of the first response; other numbers draw other random numbers.
        progress: called with how many responses there are.
        columns: further columns of the prompts' data, an entry per prompt.
    """
    rows: list[list[int]] = []
    index = [i // repeats % len(prompts) for i in range(count)]
    chosen = [prompts[i] for i in index]
    for start in range(0, count, batch_size):
        batch = chosen[start : start + batch_size]
        episodes = SAMPLE_EPISODES + first + start + np.arange(len(batch))
        uniforms = rng.uniform(seed, rng.TOKEN, episodes[:, None], np.arange(max_new_tokens))
        response, _ = generate(
            model,
            torch.from_numpy(left_pad(batch, max(map(len, batch)))).to(model.device),
            torch.from_numpy(uniforms).to(model.device),
            eos_token_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            min_new_tokens=min_new_tokens,
        )
        rows += [row[row >= 0].tolist() for row in response]
        if progress is not None:
            progress(len(rows))
    return as_samples(
        Codec(tokenizer, model),
        chosen,
        rows,
        eos_token_id,
        {name: [values[i] for i in index] for name, values in (columns or {}).items()},
    )


def as_samples(
    codec: Codec,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[list[int]],
    eos_token_id: EosIds,
    columns: dict[str, list[Any]],
) -> Samples:
    """Responses as rewards take them.

    Args:
        prompts, responses: N of each, token ids without padding.
        columns: further columns of the prompts' data, N entries each.
    """
    texts, completions = codec.decode(prompts, responses)
    return Samples(
        prompts=texts,
        completions=completions,
        completion_ids=list(responses),
        finish_reasons=["stop" if row[-1] in eos_ids(eos_token_id) else "length" for row in responses],
        columns=columns,
    )
