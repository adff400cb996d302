"""What the tasks made of a file of the user's own share: the cache, a byte-level tokenizer, and bundles of texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import tokenizers
import torch
import transformers
from annotated_types import Interval
from tokenizers import decoders, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lm_envs import files, training
from lm_envs.data import conventions, dataset, sources, splits
from lm_envs.data.splits import warn_if_few
from lm_envs.model import text
from lm_envs.model import tokens as observations
from lm_envs.settings import NonNegative, Seed, Settings, Size
from lm_envs.tasks import sampling

END = "<|end|>"
_TASK = "task.json"


@dataclass(frozen=True)
class OwnTextConfig(Settings):
    """What the tasks of a file of the user's own share.

    Attributes:
        seed: of the initial weights, the order of training and the samples.
        vocabulary: tokens at most.
        hidden, heads: of the models; how many ``layers`` and the horizon are each task's own.
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
    """The folder that ``build`` fills, kept under the file's content, every setting and what makes it; what ``build``
    returned, in JSON's types; and the tokenizer that it saved.

    Args:
        code: the source file of the task, and the modules of ours that it uses beyond this one's.
        libraries: those that it uses beyond torch, transformers, tokenizers and NumPy.
    """
    with path.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    used = [*code, __file__, conventions, dataset, sources, splits, sampling, observations, text, training]
    parts = {
        "content": content,
        "config": asdict(config),
        "code": files.code_hash([source if isinstance(source, str) else str(source.__file__) for source in used]),
        "versions": {one.__name__: one.__version__ for one in (torch, transformers, tokenizers, np, *libraries)},
    }

    def fill(folder: Path) -> None:
        (folder / _TASK).write_text(json.dumps(build(folder)))

    folder = files.cached(task, parts, fill)
    known = json.loads((folder / _TASK).read_text())
    warn_if_few(path.name, known["prompts"])
    return folder, known, PreTrainedTokenizerFast.from_pretrained(folder / "policy")


def make_tokenizer(texts: Sequence[str], vocabulary: int, padding_side: str = "left") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts. Its one special token, id 0, ends texts and pads.

    Words carry the space before them, the first one too, so that texts join and round-trip.
    """
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=END,
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )


def token_bundles(sizes: Sequence[tuple[int, ...]], tokens: int) -> list[list[int]]:
    """Indices of texts of nearly one size together, with about as many tokens in each bundle.

    So a step's mean over tokens does not favor short texts.

    Args:
        sizes: of each text what it is sorted by; the first number is its tokens.
        tokens: in a bundle.
    """
    bundles: list[list[int]] = [[]]
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if bundles[-1] and (len(bundles[-1]) + 1) * sizes[i][0] > tokens:
            bundles.append([])
        bundles[-1].append(i)
    return bundles
