"""The memory of one process of a run, by a formula of its sizes, and what makes it smaller.

docs/scale.md explains the parts, and ``lm-envs bench plan`` measures how far the sums are from the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from lm_envs.kernels.linear_logprob_kl import CHUNK
from lm_envs.model.forwards import MOST_LOGITS, TOKENS
from lm_envs.model.kv_cache import ROOM

BASE = 500 * 10**6  # bytes of a process with torch, transformers and this package
KEPT = 1.1  # numbers that a layer keeps for backward, to those that its matrices read and write; measured
KEPT_LOW = 1.25  # the same in bfloat16, where norms compute in float32
ALLOCATOR = 0.05  # of everything else: memory that is free and not given back
FRAGMENTS = 0.6  # the same of activations in tensors that glibc keeps in its heap; measured
FRAGMENTS_RECOMPUTED = 2.0  # the same where layers compute theirs again, which come and go among them; measured
HEAP = 2**25  # bytes from which a tensor is memory of its own, which is given back


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, in numbers; ``itemsize`` in bytes.

    Attributes:
        parameters: of the whole model.
        itemsize: of a weight.
        layers: their count, 0 for a model that has none.
        width: of the hidden states.
        matrices: read and written by the matrices of a layer for a token.
        products: written by those of them that do not narrow, which recomputation keeps.
        widest: written by the widest of them.
        keys: keys and values of a layer for a token.
        vocabulary: outputs; 0 for a classifier.
        largest: of the largest parameter.
        outside: of the parameters that are in no layer.
    """

    parameters: int
    itemsize: int = 4
    layers: int = 0
    width: int = 0
    matrices: int = 0
    products: int = 0
    widest: int = 0
    keys: int = 0
    vocabulary: int = 0
    largest: int = 0
    outside: int = 0

    @property
    def bytes(self) -> int:
        return self.parameters * self.itemsize

    def reading(self, tokens: int) -> int:
        """Return the bytes that a forward without gradients holds at a time, those of one layer."""
        return tokens * (2 * self.width + 3 * self.widest) * self.itemsize

    def kept(self, tokens: int, layers: int, recomputed: bool) -> int:
        """Return the bytes that a forward keeps for backward in its upper ``layers``, and those of the layer that
        backward is in."""
        whole = (KEPT if self.itemsize > 2 else KEPT_LOW) * self.matrices
        each = self.width + self.products if recomputed else whole
        return int(tokens * (layers * each + whole) * self.itemsize)


@dataclass(frozen=True)
class Sizes:
    """What decides the memory of one process of a run.

    Attributes:
        policy: the model that is trained, or measured where nothing is.
        own: its numbers that no other model holds.
        trained: its numbers that are trained, with those of its heads and of a value model.
        trained_layers: its upper layers that a gradient goes through.
        others: bytes of the reference, and of the start where that is another model.
        rewards: learned reward models and judges.
        critic: a value model.
        prompt, new: longest prompt and response in tokens.
        rows: texts sampled at a time in training, 0 for an algorithm that does not sample.
        measured: texts sampled at a time to measure.
        batch: texts of a forward with gradients, 0 where nothing is trained.
        distribution: whether the loss needs the probabilities of all tokens.
        adapters: whether the finished model is saved as adapters alone.
        device: "cpu" or "cuda".
        shares: processes that hold a share each of what is trained; 1 for a copy on each.
    """

    policy: Shape
    own: int
    trained: int = 0
    trained_layers: int = 0
    others: int = 0
    rewards: tuple[Shape, ...] = ()
    critic: Shape | None = None
    prompt: int = 0
    new: int = 0
    rows: int = 0
    measured: int = 0
    batch: int = 0
    distribution: bool = False
    adapters: bool = False
    device: str = "cpu"
    shares: int = 1

    @property
    def state(self) -> int:
        """Bytes of Adam's state for a trained number: two moments, and a float32 copy of a number of less precision."""
        return 2 * max(4, self.policy.itemsize) + (4 if self.policy.itemsize < 4 else 0)

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        return self.trained * (self.policy.itemsize + self.state)

    @property
    def model(self) -> int:
        """Bytes of the finished model."""
        return self.own * self.policy.itemsize if self.adapters else self.policy.bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: what is held all the time, and in each phase of an iteration, by part."""

    lasting: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def peak(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """The parts at the peak."""
        held = self.lasting | self.phases[self.peak]
        return held | {"allocator": int(ALLOCATOR * sum(held.values()))}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(sizes: Sizes) -> Memory:
    """Return the memory of one process of a run: of the GPU's where it trains on one, else of the machine's.

    A sum of formulas; what a batch really takes is less where prompts or responses are shorter than the longest.
    """
    policy, on_gpu, shares = sizes.policy, sizes.device == "cuda", sizes.shares
    size, text = policy.itemsize, sizes.prompt + sizes.new
    base, adam = {"python and torch": 0 if on_gpu else BASE}, {"Adam": sizes.trained * sizes.state // shares}
    weights = {
        "policy": sizes.own * size,
        "reference": sizes.others,
        "reward models": sum(shape.bytes for shape in sizes.rewards),
        "value model": 0 if sizes.critic is None else sizes.critic.bytes,
    }
    gradients = sizes.trained * size

    def vocabulary(rows: int, gradients: bool) -> tuple[int, bool]:
        """Bytes for logits of texts, and whether they are made in chunks because they are many."""
        count = rows * sizes.new * policy.vocabulary
        if count > MOST_LOGITS[sizes.device] and not sizes.distribution:
            return min(count, max(16 * policy.vocabulary, CHUNK[sizes.device])) * size, True
        return count * (max(size, 4) * (3 if gradients else 2) + (size if size < 4 else 0)), False

    rows = max(sizes.rows, sizes.measured)
    columns = sizes.prompt + (max(sizes.new, sizes.prompt, ROOM) if sizes.new > 1 else 0)
    caches = rows * columns * policy.keys * size
    next_tokens = caches + rows * policy.vocabulary * (8 + (size if size < 4 else 0))  # a layer is copied at a time
    sampling = {
        "key and value caches": policy.layers * caches,
        "activations": max(policy.reading(rows * sizes.prompt), next_tokens),
    }
    at_once = min(rows, max(1, TOKENS[on_gpu] // max(text, 1)))
    readers = (policy, *sizes.rewards)
    scoring = {
        "activations": max(shape.reading(at_once * text) for shape in readers),
        "vocabulary": vocabulary(at_once, False)[0],
    }
    logits, chunked = vocabulary(sizes.batch, True)
    activations = policy.kept(sizes.batch * text, sizes.trained_layers, chunked) if sizes.batch else 0
    if sizes.critic is not None:
        activations += sizes.critic.kept(sizes.batch * text, sizes.critic.layers, False)
    tied = policy.largest * max(size, 4) if sizes.trained_layers and sizes.trained >= policy.largest else 0
    in_heap = not on_gpu and sizes.batch * text * policy.widest * size < HEAP
    fragments = int((FRAGMENTS_RECOMPUTED if chunked else FRAGMENTS) * activations) if in_heap else 0
    updating = {"activations": activations, "fragments": fragments, "vocabulary": logits, "a gradient under way": tied}
    phases = {"sampling": sampling, "scoring": scoring, "update": updating}
    if size < 4:
        phases["Adam's step"] = {"gradients in float32": 4 * sizes.trained // shares}
    if not on_gpu:  # their copies are on the CPU
        phases["checkpoint"] = {"copies to write": sizes.checkpoint}
    if shares == 1:
        return Memory(base | weights | {"gradients": gradients} | adam, phases)
    outside, layers = policy.outside * size, (policy.parameters - policy.outside) * size
    updating["put together"] = outside + 2 * layers // max(policy.layers, 1)
    sums = policy.outside * (size + max(size, 4)) if sizes.trained >= policy.parameters else 0
    phases["the end of backward"] = {"put together": outside, "gradients to sum": sums}
    cut = {name: count // shares for name, count in weights.items()} | {"gradients": gradients // shares}
    if sizes.distribution:  # the loss reads the reference
        cut["reference"] = weights["reference"]
    updates = ("update", "Adam's step", "the end of backward")
    return Memory(base | adam, {name: (cut if name in updates else weights) | held for name, held in phases.items()})


def _in_batches(sizes: Sizes, most: int) -> Sizes:
    return replace(sizes, batch=min(sizes.batch, most))


def _smaller(sizes: Sizes) -> Iterator[tuple[str, Callable[[Sizes], Sizes]]]:
    """Yield settings that take less memory and what they make of sizes, those that change least first."""
    batch = sizes.batch
    while batch > 1:
        batch //= 2
        yield f"micro_batch={batch}", partial(_in_batches, most=batch)
    if sizes.measured > 16:
        yield "16 test and validation prompts", lambda s: replace(s, measured=16)
    if sizes.trained > sizes.policy.parameters // 10:
        few = sizes.policy.parameters // 50  # of rank 16 on all matrices of a model of a billion; more of a small one
        yield "--lora-rank 16", lambda s: replace(s, own=few, trained=few)
    if sizes.policy.itemsize > 2:
        half = replace(sizes.policy, itemsize=2)
        yield "--dtype bfloat16", lambda s: replace(s, policy=half, others=s.others // 2)
    if sizes.rows > 1:
        yield "fewer episodes", lambda s: replace(s, rows=1)


def advice(sizes: Sizes, free: float) -> str:
    """Return the setting that makes a run fit into ``free`` bytes, or several that do together."""
    for text, change in _smaller(sizes):
        if memory(change(sizes)).total <= free:
            return text
    tried: dict[str, str] = {}
    for text, change in _smaller(sizes):
        sizes = change(sizes)
        tried[text.partition("=")[0]] = text
        if memory(sizes).total <= free:
            return " and ".join(tried.values())
    return "a smaller model, or a machine with more memory"


def size(count: float) -> str:
    """Return ``1.25 GB``, ``384 MB`` or ``12 kB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e3:.0f} kB"
