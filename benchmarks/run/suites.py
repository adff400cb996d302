"""The parts of a comparison: tasks, algorithms and seeds, how much to train, and each run's settings, which are parsed
and checked before anything trains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.names import is_control, run_name
from lm_envs.settings import Count, Finite, NonNegative, Positive, Settings, Several, Size, Whole, make, short

Service: TypeAlias = Literal["wandb", "mlflow", "trackio"]
"""What can follow a run beside TensorBoard."""
BUDGETS = ("iterations", "episodes", "tokens", "total_tokens", "reward_calls", "flops", "seconds")


@dataclass(frozen=True)
class Plan(Settings):
    """The amount of training and the intervals of measurement, the same for every run of a comparison.

    Attributes:
        iterations: iterations of every trained run; None leaves it to ``episodes`` or to the algorithm.
        episodes: training episodes of every run, rounded up to whole iterations.
        test_prompts: test prompts of the final evaluation; None is all.
        validation_prompts: validation prompts of a point of the learning curve.
        validate_every: iterations between points of the learning curve, 0 for none; fewer if a short run would have
            less than four points.
        checkpoint_every: iterations between checkpoints.
        tokens: response tokens sampled in training, until a run ends.
        total_tokens: tokens that are sampled in training and that are scored there, see docs/costs.md.
        reward_calls: responses scored in training, until a run ends.
        flops: floating-point operations of the optimizer, 6 per trained parameter and trained token.
        seconds: of training; the only budget that a rerun does not repeat exactly.
        split: whose prompts the final evaluation takes; the validation prompts are for tuning.
    """

    iterations: Count | None = None
    episodes: Count | None = None
    test_prompts: Several | None = 256
    validation_prompts: Size = 64
    validate_every: Whole = 10
    checkpoint_every: Count = 20
    tokens: Count | None = None
    total_tokens: Count | None = None
    reward_calls: Count | None = None
    flops: Positive | None = None
    seconds: Positive | None = None
    split: Literal["test", "validation"] = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a run has one budget, and {' and '.join(given)} are given")

    @property
    def spending(self) -> tuple[str, float] | None:
        """The budget that is spent while a run trains, with its amount; None where iterations are known before."""
        return next(((name, amount) for name in BUDGETS[2:] if (amount := getattr(self, name)) is not None), None)


@dataclass(frozen=True)
class EnvOptions(Settings):
    """Options of :class:`lm_envs.env.mdp.TextMDP` that a suite or ``--env`` may set; None is the task's own."""

    kl_coef: NonNegative | None = None
    temperature: Positive | None = None
    max_new_tokens: Size | None = None
    min_new_tokens: Whole | None = None
    missing_eos: tuple[Literal["replace", "subtract"], Finite] | None = None


def env_options(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return options of the environment in JSON's types; raise SettingError for an unknown one or a wrong value."""
    made = make(EnvOptions, values, where)
    found = {name: getattr(made, name) for name in values}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


Action: TypeAlias = Literal["stop", "tell", "off"]


@dataclass(frozen=True)
class Guards(Settings):
    """The band that a policy has to stay in, and what is done when it leaves it.

    The methods of the embedded Reviews task end at 0.1 to 0.8 nats per token and 0.46 to 1 of SFT's distinct-2; those
    that collapse there (GRPO without a whole KL term, online DPO) at 1.2 to 3 nats or 0.16 to 0.28.

    Attributes:
        kl_per_token: most nats of KL per token of a response, the mean over a batch.
        distinct_2: least share of different token pairs in a batch, as a part of the first batch's.
        action: "stop" ends the run there, "tell" lets it go on and says so in its result, "off" does neither. None
            stops language models of 20 million parameters and more, and tells of smaller ones.
    """

    kl_per_token: Positive = 1.5
    distinct_2: NonNegative = 0.25
    action: Action | None = None

    def acts(self, parameters: int) -> Action:
        """Return the action for a model of this many parameters."""
        from lm_envs.algos.engine.settings_by_size import SMALL

        return self.action or ("stop" if parameters >= SMALL else "tell")

    def collapse(self, kl: float, length: float, distinct: float, start: float) -> str | None:
        """Return how a policy has collapsed, None if it has not; NaN is unknown and no collapse.

        Args:
            kl: nats per response.
            length: tokens per response.
            distinct: distinct-2 of the responses.
            start: distinct-2 of as many responses of the policy as it started.
        """
        if length > 0 and kl / length > self.kl_per_token:
            return f"KL of {kl / length:.1f} nats per token, above {self.kl_per_token:g}"
        if distinct < self.distinct_2 * start:
            share = f"{distinct / start:.2f} of the start's share of different token pairs"
            return f"{share}, below {self.distinct_2:g}"
        return None


@dataclass(frozen=True)
class Range(Settings):
    """Numbers between two ends, whole ones if both ends are."""

    low: int | Finite
    high: int | Finite
    log: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"a range needs low < high, and low > 0 with log, got {self.low} to {self.high}")


@dataclass(frozen=True)
class Resources(Settings):
    """What a process of a run takes of a node of a Ray cluster, and how many processes a run has there.

    Attributes:
        cpus: cores; None takes as many as the run has threads.
        gpus: GPUs; a fraction shares one with other runs.
        memory: gigabytes, by which Ray decides how many runs fit on a node; 0 leaves it to the cores.
        processes: processes of one node that share each run.
        fsdp: whether they share out what is trained.
    """

    cpus: Count | None = None
    gpus: NonNegative = 0
    memory: NonNegative = 0
    processes: Count = 1
    fsdp: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"a run takes a fraction of one GPU or several whole ones, not {self.gpus}")
        if self.processes > 1 and self.gpus not in (0, 1):
            raise ValueError(f"each of several processes takes a whole GPU or none, not {self.gpus:g}")
        if self.fsdp and self.processes == 1:
            raise ValueError("fsdp shares out the weights among processes: set processes")


Space = dict[str, Range | tuple[Any, ...]]
"""What is tried of an algorithm's settings in tuning: a range, or one of several values."""


@dataclass(frozen=True)
class TaskSettings:
    """The settings of one task of a suite."""

    name: str  # a registered task, one with "-bandit" at the end, or the id of a control environment
    algorithms: tuple[str, ...] | None = None  # None takes the suite's
    env: dict[str, Any] = field(default_factory=dict)  # EnvOptions, those that are set
    options: dict[str, Any] = field(default_factory=dict)  # of the task's loader
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # by algorithm, on top of the suite's


@dataclass(frozen=True)
class RunSpec:
    """One cell of a comparison: everything that decides what its run does, in JSON's types."""

    task: str
    algorithm: str
    seed: int
    plan: Plan
    env: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    adaptation: dict[str, Any] = field(default_factory=dict)
    compile: bool = False
    guards: dict[str, Any] = field(default_factory=dict)  # Guards, those that are set
    stop: list[str] = field(default_factory=list)  # stop rules as they are written
    task_seed: int = 0  # of the task's models; 0 are its own

    @property
    def label(self) -> str:
        """The name of the run and of its folder, see :func:`~lm_envs.benchmarks.run.names.run_name`."""
        return run_name(self.task, self.algorithm, self.seed, self.task_seed)

    @property
    def folder(self) -> str:
        return self.label

    def to_json(self) -> dict[str, Any]:
        """Return the settings as nested dictionaries, without those that are empty or False."""
        left_out = ("adaptation", "compile", "guards", "stop", "task_seed")
        return {key: value for key, value in asdict(self).items() if value or key not in left_out}


@dataclass(frozen=True)
class Suite:
    """A comparison: tasks x algorithms x seeds, how much to train, and what differs from the defaults.

    Attributes:
        adaptation: which part of the language models is trained, see
        :class:`lm_envs.algos.policies.adaptation.Adaptation`.
        compile: compile the sampling of the trained language models, see :mod:`lm_envs.model.compiled`.
        every: the algorithms are "all": those that a task does not suit are left out.
        match_kl: KLs, nats per response, at which methods are compared by their validation curves.
        guards: what differs from the defaults of :class:`Guards`.
        task_seeds: versions of a task's models that the methods run on, the task's own and others.
        stop: rules that end a run before its budget, see :mod:`lm_envs.benchmarks.run.stop_rules`.
        keep: checkpoints that a finished run keeps, so that it can be extended later.
        resources: what each run takes of a node of a Ray cluster.
        tune: what is tried of algorithms' settings by :func:`lm_envs.benchmarks.run.tuning.tune`, by algorithm.
    """

    name: str
    tasks: tuple[TaskSettings, ...]
    algorithms: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    plan: Plan = Plan()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    description: str = ""
    adaptation: dict[str, Any] = field(default_factory=dict)
    compile: bool = False
    every: bool = False
    match_kl: tuple[float, ...] = ()
    keep: int = 0
    resources: Resources = Resources()
    tune: dict[str, Space] = field(default_factory=dict)
    guards: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    task_seeds: int = 1

    def runs(self) -> list[RunSpec]:
        """Return the cells: for each task all algorithms with the first seed, then with the next, so that early results
        say most."""
        return [
            self._run(task, algorithm, seed, task_seed)
            for task in self.tasks
            for task_seed in range(1 if is_control(task.name) else self.task_seeds)
            for seed in self.seeds
            for algorithm in task.algorithms or self.algorithms
        ]

    def _run(self, task: TaskSettings, algorithm: str, seed: int, task_seed: int) -> RunSpec:
        overrides = {**self.overrides.get(algorithm, {}), **task.overrides.get(algorithm, {})}
        models = {"adaptation": self.adaptation, "compile": self.compile, "guards": self.guards}
        models = {} if is_control(task.name) else models
        more = {**models, "stop": list(self.stop), "task_seed": task_seed}
        return RunSpec(task.name, algorithm, seed, self.plan, task.env, task.options, overrides, **more)  # type: ignore[arg-type]


def check_adaptation(settings: Mapping[str, Any]) -> None:
    """Raise ValueError or UserError unless these settings make an Adaptation that works here."""
    if not settings:
        return
    from lm_envs.algos.policies.adaptation import Adaptation

    adaptation = make(Adaptation, settings, "adaptation")
    if adaptation.lora_rank and find_spec("peft") is None:
        raise UserError("lora_rank needs peft: pip install 'lm-envs[lora]'")


def parse_settings(items: Sequence[str], option: str = "--set", example: str = "learning_rate=1e-3") -> dict[str, Any]:
    """Parse ``["learning_rate=1e-3", "anneal=false"]`` to a dictionary; values are numbers, true, false, none, or else
    text. ``option`` and ``example`` are for the UserError about an item without "=", or a name given twice.
    """
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UserError(f"{option} takes name=value, as in {option} {example}, not {short(item)}")
        if name in found:
            raise UserError(f"{option} gives {name!r} twice")
        found[name] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # text; digits by the thousand; brackets thousands deep
        return text


def check_overrides(algorithm: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides of an algorithm's settings in the right types (an int may stand for a float).

    Raises:
        UserError: an unknown setting, with similar names, or a value of the wrong type or out of range.
    """
    from lm_envs.algos.policies.language_model import NO_TRUNCATION
    from lm_envs.algos.registry import make_config

    for name in overrides:
        if name in ("top_k", "top_p"):
            raise UserError(f"{algorithm}.{name}: {NO_TRUNCATION}")
        if name == "seed":
            raise UserError(f"{algorithm}.seed: the run's seed decides it: set --seed, --seeds or the suite's seeds")
    try:
        made = make_config(algorithm, **overrides)
    except ValueError as error:
        raise UserError(str(error)) from error
    return {name: getattr(made, name) for name in overrides}


def only_larger(config: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a run differs from an older one in nothing but a larger budget of the same kind."""
    old = config["run"]
    rest = [{k: v for k, v in run["plan"].items() if k not in BUDGETS} for run in (old, new)]
    if {**old, "plan": rest[0]} != {**new, "plan": rest[1]} or "iterations" in new.get("overrides", {}):
        return False  # its own iterations come before those of the plan
    amounts = [{k: v for k, v in run["plan"].items() if k in BUDGETS and v is not None} for run in (old, new)]
    if not amounts[0] and config["agent"] is not None:  # the algorithm's own number
        amounts[0] = {"iterations": config["agent"]["iterations"]}
    before, now = amounts
    return before.keys() == now.keys() and all(now[kind] > before[kind] for kind in now)
