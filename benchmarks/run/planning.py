"""What runs take, before anything is trained: memory, tokens and disk, from the sizes of their models and batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lm_envs.algos.best_of_n import BestOfN
from lm_envs.algos.engine.settings_by_size import rows_at_once
from lm_envs.algos.policies.critics import RewardCritic
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.benchmarks.run.budgets import LEAST_POINTS, MOST
from lm_envs.benchmarks.run.memory import Memory, Shape, Sizes, advice, memory, size
from lm_envs.benchmarks.run.problems import TextProblem
from lm_envs.benchmarks.run.storage import KEEP
from lm_envs.benchmarks.run.suites import RunSpec
from lm_envs.model.adapters import has_adapters

# ---- the sizes of a run ----


def shape_of(model: Any) -> Shape:
    """Return the sizes of a language model or classifier of transformers, from its config and its last layer."""
    parameters = list(model.parameters())
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", 0)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outputs = model.get_output_embeddings()
    found = Shape(
        parameters=sum(p.numel() for p in parameters),
        itemsize=model.dtype.itemsize,
        vocabulary=0 if outputs is None else int(outputs.weight.shape[0]),
        largest=max(p.numel() for p in parameters),
        outside=sum(p.numel() for p in {*parameters}.difference(p for stack in stacks for p in stack.parameters())),
    )
    if not stacks:
        return found
    matrices = [m for name, m in stacks[-1][-1].named_modules() if _is_matrix(m) and "lora_" not in name]
    sides = [m.weight.shape if isinstance(m, Conv1D) else m.weight.shape[::-1] for m in matrices]
    heads = getattr(config, "num_attention_heads", 1)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return replace(
        found,
        layers=count,
        width=config.hidden_size,
        matrices=sum(into + out for into, out in sides),
        products=sum(out for into, out in sides if into <= out),
        widest=max((out for _, out in sides), default=0),
        keys=2 * head * (getattr(config, "num_key_value_heads", None) or heads),
    )


def _critic_shape(critic: nn.Module | None) -> Shape | None:
    if isinstance(critic, RewardCritic):
        return shape_of(critic.model)
    return None if critic is None else Shape(sum(p.numel() for p in critic.parameters()))


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def sizes_of(problem: Any, processes: int = 1, fsdp: bool = False) -> Sizes:
    """Return the sizes of a run whose problem was opened, for one of ``processes``, with copies or with shares."""
    count = processes
    agent, policy = problem.agent, problem.policy
    if not isinstance(problem, TextProblem) or problem.exact is not None:
        numbers = 0 if agent is None else sum(p.numel() for p in policy.parameters())
        return Sizes(Shape(numbers), numbers, trained=numbers)
    task, spec = problem.task, problem.spec
    device = str(spec.options.get("device", ""))
    others = {id(model): model for model in (task.reference, task.start)}
    elsewhere = {id(p): p for model in others.values() for p in model.parameters()}
    prompts = [len(task.prompts[split]) for split in ("validation", spec.plan.split)]
    most = (spec.plan.validation_prompts, spec.plan.test_prompts or prompts[1])
    together = rows_at_once(sum(p.numel() for p in task.reference.parameters()))
    measured = max(min(have, wanted) for have, wanted in zip(prompts, most, strict=True))
    found = Sizes(
        policy=shape_of(task.start),
        own=0,
        others=sum(p.numel() * p.element_size() for p in elsewhere.values()),
        rewards=tuple(shape_of(model) for model in {id(part.model): part.model for part in task.learned}.values()),
        prompt=task.prompt_length,
        new=spec.env.get("max_new_tokens", task.max_new_tokens),
        measured=min(together, -(-measured // count)),
        device="cuda" if "cuda" in (task.reference.device.type, device.partition(":")[0]) else "cpu",
        shares=processes if fsdp else 1,
    )
    if agent is None or not isinstance(policy, LMPolicy):
        several = policy.n if isinstance(policy, BestOfN) else 1
        return replace(found, measured=min(together, found.measured * several))
    config, trained = agent.config, [p for p in policy.parameters() if p.requires_grad]
    own = [p for p in policy.parameters() if id(p) not in elsewhere]
    of_critic = {id(p) for p in policy.critic.parameters()} if policy.critic is not None else set()
    merged = spec.adaptation.get("lora_merge", False)
    share = -(-config.episodes // config.group_size // count) * config.group_size
    learned = -(-config.learned * (2 if agent.preference_data else 1) // count)
    batch = min(config.micro_batch or -(-learned // config.minibatches), learned)
    return replace(
        found,
        own=sum(p.numel() for p in own if id(p) not in of_critic),
        trained=sum(p.numel() for p in trained),
        trained_layers=found.policy.layers - spec.adaptation.get("freeze_layers", 0),
        critic=_critic_shape(policy.critic),
        rows=0 if agent.needs_data else share,
        batch=max(batch, config.group_size) if agent.unit == "group" else batch,
        adapters=has_adapters(policy.model) and bool(policy.model.name_or_path) and not merged,
        distribution=getattr(config, "kl_loss", None) == "full",
    )


# ---- what a run takes beside memory ----


@dataclass(frozen=True)
class RunPlan:
    """What one run of a task by an algorithm takes; runs with other seeds take the same.

    Attributes:
        iterations: None where another budget ends the run; 0 where nothing is trained.
        texts: sampled in training, and scored by the reward; None where that is unknown.
        validated: prompts of a point of the learning curve.
        measured: texts sampled in all to measure.
        seconds: of an iteration and of the whole run, where they were timed; the latter None where it is unknown.
        keep: checkpoints of a finished run.
    """

    spec: RunSpec
    sizes: Sizes
    memory: Memory
    parameters: int
    trained: int
    iterations: int | None = 0
    texts: int | None = 0
    validated: int = 0
    measured: int = 0
    seconds: tuple[float, float | None] | None = None
    keep: int = 0

    @property
    def name(self) -> str:
        return f"{self.spec.task}/{self.spec.algorithm}"

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        return 0 if self.iterations == 0 else self.sizes.checkpoint

    @property
    def model(self) -> int:
        """Bytes of the finished model, which a run that trains nothing does not save."""
        return 0 if self.iterations == 0 else self.sizes.model

    def tokens(self, texts: int | None) -> int | None:
        """Return the most tokens that these responses can have."""
        return None if texts is None else texts * self.sizes.new

    @property
    def scored(self) -> int | None:
        """Tokens that the reward, the reference and a value model read in training, at most (docs/costs.md)."""
        readers = 2 + (self.sizes.critic is not None)
        return None if self.texts is None else readers * self.texts * (self.sizes.prompt + self.sizes.new)


def plan_of(problem: Any, keep: int = 0, processes: int = 1, fsdp: bool = False) -> RunPlan:
    """Return the plan of a run whose problem was opened."""
    sizes, agent, plan = sizes_of(problem, processes, fsdp), problem.agent, problem.spec.plan
    counts = problem.settings()
    found = RunPlan(problem.spec, sizes, memory(sizes), counts["parameters"], counts["trainable_parameters"], keep=keep)
    if agent is not None:
        iterations = None if agent.config.iterations >= MOST else agent.config.iterations
        sampled = None if iterations is None or agent.config.episodes is None else iterations * agent.config.episodes
        found = replace(found, iterations=iterations, texts=0 if agent.needs_data else sampled)
    if not isinstance(problem, TextProblem):
        return found
    test = min(plan.test_prompts or MOST, len(problem.task.prompts[plan.split]))
    validated = min(plan.validation_prompts, len(problem.task.prompts["validation"]))
    several = problem.policy.n if isinstance(problem.policy, BestOfN) else 1
    every = min(plan.validate_every, max(1, (found.iterations or 1) // LEAST_POINTS))
    points = (found.iterations or 0) // every + 1 if every and found.iterations != 0 else 0
    return replace(found, validated=validated, measured=points * validated + test * (1 + several))


# ---- whether it fits ----


UNKNOWN = 2**63 - 1  # free bytes, elsewhere than on Linux


def free_memory(device: str = "cpu") -> int:
    """Return the bytes that a run may take: what is free on the machine (or its container, or the GPU) and what this
    process holds."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()
    if not Path("/proc/meminfo").exists():
        return UNKNOWN
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return min(_numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024, free_in_container()) + own


def free_in_container(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that are left below the limit of a control group (version 2), files that may leave its cache
    included."""
    limit = group / "memory.max"
    if not limit.exists() or not (most := limit.read_text().strip()).isdigit():
        return UNKNOWN
    return int(most) - int((group / "memory.current").read_text()) + _numbers(group / "memory.stat")["inactive_file"]


def _numbers(table: Path) -> dict[str, int]:
    """The second words of a file's lines by the first."""
    lines = (line.split() for line in table.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}


def needed(plans: Sequence[RunPlan], at_once: int) -> tuple[RunPlan, int]:
    """Return the run that takes the most memory, and the bytes of as many such processes at once."""
    most = max(plans, key=lambda plan: plan.memory.total)
    return most, most.memory.total * (1 if most.sizes.device == "cuda" else at_once)


def does_not_fit(plans: Sequence[RunPlan], at_once: int, free: float) -> str | None:
    """Return a line about a run that needs more memory than is free, with the remedy; None if all fit."""
    most, total = needed(plans, at_once)
    if total <= free:
        return None
    each = f"{at_once} processes of {size(most.memory.total)}" if at_once > 1 else size(most.memory.total)
    few = "fewer --jobs or --processes, or " if at_once > 1 else ""
    return (
        f"memory: {most.name} takes about {each}, and {size(free)} are free, so it may be killed; try "
        f"{few}{advice(most.sizes, free / at_once)} (`lm-envs plan` shows the parts)"
    )


def disk(plans: Sequence[RunPlan], runs: Sequence[RunSpec], at_once: int = 1) -> tuple[int, int]:
    """Return the most bytes that runs hold on the disk while they train, ``at_once`` side by side, and when all are
    finished. A run holds a checkpoint more than it keeps while it writes one."""
    by_name = {(plan.spec.task, plan.spec.algorithm): plan for plan in plans}
    ours = [by_name[run.task, run.algorithm] for run in runs if (run.task, run.algorithm) in by_name]
    finished = sum(plan.model + plan.keep * plan.checkpoint for plan in ours)
    under_way = sorted(((max(KEEP, plan.keep) + 1) * plan.checkpoint for plan in ours), reverse=True)
    return finished + sum(under_way[:at_once]), finished


def announcement(plans: Sequence[RunPlan], runs: Sequence[RunSpec], at_once: int) -> Iterator[str]:
    """Yield what is said before runs begin: the size of their checkpoints, and whether one may not fit into memory."""
    largest = max(plans, key=lambda plan: plan.checkpoint)
    if largest.checkpoint:
        most, finished = disk(plans, runs, at_once)
        each = f"checkpoints of {size(largest.checkpoint)}"
        yield f"disk: up to {size(most)} while training ({each}), {size(finished)} when finished"
    if (line := does_not_fit(plans, at_once, free_memory(largest.sizes.device))) is not None:
        yield f"warning: {line}"
