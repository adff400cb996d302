"""Tools of the builders of tasks: training and sampling with a progress bar, small models, and, for tasks made from a
user's file, the cache, a byte-level tokenizer and bundles of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import tokenizers
import torch
import transformers
from annotated_types import Interval
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_model
from tokenizers import decoders, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lm_envs import files, rng, training
from lm_envs.data import conventions, dataset, sources, splits
from lm_envs.model import text
from lm_envs.model import tokens as observations
from lm_envs.model.decoding import generate
from lm_envs.model.text import Codec
from lm_envs.model.tokens import EosIds, eos_ids, left_pad
from lm_envs.reward.learned import LearnedReward
from lm_envs.reward.units import Samples
from lm_envs.settings import NonNegative, Seed, Settings, Size

if TYPE_CHECKING:
    from lm_envs.tasks.base import TextTask

Model = TypeVar("Model", bound=PreTrainedModel)

# Samples that make a task take their random numbers from episodes that no training run reaches.
SAMPLE_EPISODES = 2**40
END = "<|end|>"


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error; call what it yields with the amount done (a loss beside it is ignored)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(emoji=False, stderr=True)) as bar:
        line = bar.add_task(description, total=total)
        yield lambda done, loss=0.0: bar.update(line, completed=done)


def fit(title: str, loop: Callable[..., object], *given: Any, steps: int, **options: Any) -> None:
    """Run a loop of :mod:`lm_envs.training` with a progress bar."""
    with progress_bar(title, steps) as update:
        loop(*given, steps=steps, progress=update, **options)


def small_gpt2(
    kind: type[Model], tokenizer: PreTrainedTokenizerBase, positions: int, sizes: tuple[int, int, int], seed: int
) -> Model:
    """Return a GPT-2 of ``(width, layers, heads)`` with weights drawn from the seed; no global generator changes."""
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
    """Load the reward model that :func:`save` wrote, in units of the reference's samples."""
    model = saved_gpt2(GPT2ForSequenceClassification, folder / "reward_model")
    return LearnedReward(model, tokenizer, (normalise[0], normalise[1]), batch_size=256, name=name)


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
    """Sample ``count`` responses, ``repeats`` in a row per prompt while prompts take turns; a function of its
    arguments.

    Args:
        prompts: token ids without padding.
        first: number of the first response; other numbers draw other random numbers.
        title: of a progress bar; empty for none.
        columns: other columns of the prompts' data, an entry per prompt.
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
    others = {name: [values[i] for i in index] for name, values in (columns or {}).items()}
    return as_samples(Codec(tokenizer, model), chosen, rows, eos_token_id, others)


def response_pairs(model: PreTrainedModel, task: TextTask, split: str, pairs: int, **options: Any) -> Samples:
    """Sample pairs of a model's responses as the task has them, two in a row per prompt of a split; prompts take turns.

    Args:
        options: others of :func:`sample`.
    """
    return sample(
        model,
        task.tokenizer,
        task.prompts[split],
        2 * pairs,
        eos_token_id=task.eos_token_ids,
        max_new_tokens=task.max_new_tokens,
        min_new_tokens=task.min_new_tokens,
        temperature=task.temperature,
        columns=task.columns.get(split),
        repeats=2,
        **options,
    )


def as_samples(
    codec: Codec,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[list[int]],
    eos_token_id: EosIds,
    columns: dict[str, list[Any]],
) -> Samples:
    """Return N prompts and responses, token ids without padding, as rewards take them; columns have N entries each."""
    texts, completions = codec.decode(prompts, responses)
    reasons = ["stop" if row[-1] in eos_ids(eos_token_id) else "length" for row in responses]
    return Samples(texts, completions, list(responses), reasons, columns)


@dataclass(frozen=True)
class OwnTextConfig(Settings):
    """Settings of every task that is made from a user's file.

    Attributes:
        seed: of the initial weights, the order of training and the samples.
        vocabulary: the most tokens.
        hidden, heads: of the models.
        weight_decay: AdamW's.
    """

    seed: Seed = 0
    vocabulary: Annotated[int, Interval(ge=257, le=2**20)] = 4096  # the 256 bytes and the end
    hidden: Size = 128
    heads: Size = 4
    weight_decay: NonNegative = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} must be a multiple of heads={self.heads}")


def cached(
    task: str,
    path: Path,
    config: Any,
    build: Callable[[Path], Mapping[str, Any]],
    code: Iterable[str | ModuleType],
    libraries: Iterable[ModuleType] = (),
) -> tuple[Path, dict[str, Any], PreTrainedTokenizerFast]:
    """Return the folder that ``build`` fills, the JSON values that it returned, and the tokenizer that it saved.

    The key is a hash of the file's content, every setting and the code.

    Args:
        code: the task's source file, and modules of this package that it uses beyond those of this file.
        libraries: those that it uses beyond torch, transformers, tokenizers and NumPy.
    """
    used = [*code, __file__, conventions, dataset, sources, splits, observations, text, training]
    parts = {
        "content": files.sha256(path),
        "config": asdict(config),
        "code": files.code_hash([source if isinstance(source, str) else str(source.__file__) for source in used]),
        "versions": {one.__name__: one.__version__ for one in (torch, transformers, tokenizers, np, *libraries)},
    }
    folder = files.cached(
        task, parts, lambda folder: files.write_atomic(folder / "task.json", json.dumps(build(folder)))
    )
    known = json.loads((folder / "task.json").read_text())
    splits.warn_if_few(path.name, known["prompts"])
    return folder, known, PreTrainedTokenizerFast.from_pretrained(folder / "policy")


def make_tokenizer(texts: Sequence[str], vocabulary: int, padding_side: str = "left") -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. Its one special token, id 0, ends texts and pads.

    Words carry the space before them, the first one too, so that texts join and round-trip.
    """
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options: dict[str, Any] = {"initial_alphabet": alphabet, "special_tokens": [END], "show_progress": False}
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, **options))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=END,
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )


def token_bundles(sizes: Sequence[tuple[int, ...]], tokens: int) -> list[list[int]]:
    """Group texts of similar size into bundles of about ``tokens`` tokens each; return their indices.

    A step's mean over tokens then does not favor short texts. Texts are sorted by ``sizes``, whose first number is
    their number of tokens.
    """
    bundles: list[list[int]] = [[]]
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if bundles[-1] and (len(bundles[-1]) + 1) * sizes[i][0] > tokens:
            bundles.append([])
        bundles[-1].append(i)
    return bundles
