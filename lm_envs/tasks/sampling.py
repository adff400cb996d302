"""What the builders of tasks share: training and sampling with a progress bar, small models, and files of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_model
from transformers import GPT2Config, GPT2ForSequenceClassification

from lm_envs import rng
from lm_envs.model.decoding import generate
from lm_envs.model.text import Codec
from lm_envs.model.tokens import EosIds, eos_ids, left_pad
from lm_envs.reward.learned import LearnedReward
from lm_envs.reward.units import Samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model = TypeVar("Model", bound="PreTrainedModel")

# Samples that make a task take their random numbers from episodes that no training run reaches.
SAMPLE_EPISODES = 2**40


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; call what it gives with how much is done (and a loss, which is not shown)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(emoji=False, stderr=True)) as bar:
        line = bar.add_task(description, total=total)
        yield lambda done, loss=0.0: bar.update(line, completed=done)


def fit(title: str, loop: Callable[..., object], *given: Any, steps: int, **options: Any) -> None:
    """Call one of the loops of :mod:`lm_envs.training` with a progress bar."""
    with progress_bar(title, steps) as update:
        loop(*given, steps=steps, progress=update, **options)


def small_gpt2(
    kind: type[Model], tokenizer: PreTrainedTokenizerBase, positions: int, sizes: tuple[int, int, int], seed: int
) -> Model:
    """Return a GPT-2 of a width, layers and heads, with weights drawn from the seed and no global generator."""
    width, layers, heads = sizes
    architecture = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        activation_function="relu",  # the cheapest on a CPU
        num_labels=1,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(architecture).eval()


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, **models: PreTrainedModel) -> None:
    """Write each model into a folder of its name, with the tokenizer."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def saved_gpt2(kind: type[Model], folder: Path) -> Model:
    """Load a model faster than ``from_pretrained``, which spends a second on the layouts of other checkpoints."""
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
        model = kind(GPT2Config.from_pretrained(folder))
    load_model(model, folder / "model.safetensors")
    return model.eval()


def saved_reward(folder: Path, tokenizer: Any, normalise: Sequence[float], name: str) -> LearnedReward:
    """The reward model that :func:`save` wrote, in units of the reference's samples."""
    model = saved_gpt2(GPT2ForSequenceClassification, folder / "reward_model")
    mean, std = normalise
    return LearnedReward(model, tokenizer, normalise=(mean, std), batch_size=256, name=name)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    eos_token_id: EosIds,
    max_new_tokens: int,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 64,
    title: str = "",
    columns: Mapping[str, Sequence[Any]] | None = None,
    repeats: int = 1,
    **options: Any,
) -> Samples:
    """``count`` responses, ``repeats`` in a row to a prompt, the prompts taking turns; a function of its arguments.

    Args:
        prompts: token ids without padding.
        first: number of the first response; other numbers draw other random numbers.
        title: of a progress bar; none is shown without.
        columns: further columns of the prompts' data, an entry per prompt.
        options: ``temperature`` and ``min_new_tokens`` of :func:`~lm_envs.model.decoding.generate`.
    """
    rows: list[list[int]] = []
    index = [i // repeats % len(prompts) for i in range(count)]
    chosen = [prompts[i] for i in index]
    with progress_bar(title, count) if title else nullcontext(lambda done: None) as update:
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
                **options,
            )
            rows += [row[row >= 0].tolist() for row in response]
            update(len(rows))
    further = {name: [values[i] for i in index] for name, values in (columns or {}).items()}
    return as_samples(Codec(tokenizer, model), chosen, rows, eos_token_id, further)


def as_samples(
    codec: Codec,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[list[int]],
    eos_token_id: EosIds,
    columns: dict[str, list[Any]],
) -> Samples:
    """N prompts and responses, token ids without padding, as rewards take them; columns have N entries each."""
    texts, completions = codec.decode(prompts, responses)
    reasons = ["stop" if row[-1] in eos_ids(eos_token_id) else "length" for row in responses]
    return Samples(texts, completions, list(responses), reasons, columns)
