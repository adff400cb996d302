"""What follows a run while it trains: TensorBoard, and with ``--track`` Weights & Biases, MLflow or Trackio.

A run that is killed goes back to its last checkpoint. TensorBoard hides what came after it; the services cannot, so
they get records only once a checkpoint holds them, and never one twice.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.storage import read_json, write_json
from lm_envs.benchmarks.run.suites import Service
from lm_envs.printable import first_line

Scalars = dict[str, float]
# People look at these first; they are under "main", the rest of an algorithm's metrics under "update".
_MAIN = ("return", "score", "gold", "proxy", "kl", "kl_coef", "entropy", "length", "tokens_per_second")
_COUNTERS = ("tokens", "episodes", "steps", "reward_calls", "scored_tokens", "trained_tokens", "wall_s")
_VALIDATION = "validation_"
PROJECT = "lm-envs"


def scalars_of(metrics: Mapping[str, Any]) -> Scalars:
    """Return the finite numbers of a record by the names that trackers show, such as ``main/kl``."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and math.isfinite(value) and name != "iteration":
            if name.startswith(_VALIDATION):
                found[f"validation/{name.removeprefix(_VALIDATION)}"] = float(value)
            else:
                group = "main" if name in _MAIN else "counters" if name in _COUNTERS else "update"
                found[f"{group}/{name}"] = float(value)
    return found


def _made(path: Path) -> int:
    """The second in which an event file was made; 0 if its name has none, or one in the future."""
    made = path.name.split(".")[3]
    return int(made) if made.isdigit() and int(made) <= time.time() else 0


class Untracked:
    """Logs nothing: the tracker of processes after the first."""

    def scalars(self, *args: Any) -> None:
        return None

    def texts(self, *args: Any) -> None:
        return None

    def close(self) -> None:
        return None


class TensorBoard:
    """Writes scalars and sample texts of one run; hides what a killed process logged after iteration ``resumed_at``."""

    def __init__(self, folder: Path, resumed_at: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers sort the files by their names, which begin with the second they were made in: a file that hides what
        # another one holds has to come after it.
        while any(int(time.time()) <= _made(path) for path in folder.glob("events.out.tfevents.*")):
            time.sleep(0.05)
        # Only a fresh start logs iteration 0; a process that was killed before its first checkpoint left it.
        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else 0, flush_secs=30)

    def scalars(self, metrics: Mapping[str, Any], iteration: int) -> None:
        for name, value in scalars_of(metrics).items():
            self._writer.add_scalar(name, value, iteration)

    def texts(self, texts: Sequence[str], iteration: int, tag: str) -> None:
        """Log sample texts as one block, a line each."""
        if texts:
            self._writer.add_text(tag, "\n".join("    " + line.replace("\n", " ") for line in texts), iteration)

    def close(self) -> None:
        self._writer.close()


def check_services(services: Iterable[Service]) -> None:
    """Raise UserError for a service whose package is not installed."""
    for name in services:
        if find_spec(name) is None:
            raise UserError(f"--track {name} needs its package: pip install 'lm-envs[{name}]'")


class _Follower:
    """Sends the records of a run to a service.

    ``tracked-NAME.json`` in the run's folder says up to which iteration they were sent, and as which run.
    """

    def __init__(self, service: Service, folder: Path, label: str, config: Mapping[str, Any]) -> None:
        self.service = service
        self._state = folder / f"tracked-{service}.json"
        before: dict[str, Any] = read_json(self._state) if self._state.exists() else {"run": None, "iteration": -1}
        self._sent: int = before["iteration"]
        self._run, self._log, self.end = _OPEN[service](label, config, before["run"], folder)
        self._write()

    def _write(self) -> None:
        write_json(self._state, {"run": self._run, "iteration": self._sent})

    def send(self, records: Sequence[Mapping[str, Any]]) -> None:
        new = [record for record in records if record["iteration"] > self._sent]
        for record in new:
            self._log(scalars_of(record), record["iteration"])
        if new:
            self._sent = new[-1]["iteration"]
            self._write()


class Followers:
    """The services that follow a run, to be used with ``with``. A service that fails is left alone with a warning: the
    records stay in the run's folder, and a resumed run sends what is missing.

    Raises:
        UserError: a service cannot be reached at the start.
    """

    def __init__(self, services: Iterable[Service], folder: Path, label: str, config: Mapping[str, Any]) -> None:
        self._all = []
        self._result: Scalars = {}
        for name in services:
            try:
                self._all.append(_Follower(name, folder, label, config))
            except Exception as error:
                self._close()
                raise UserError(f"--track {name}: {first_line(error)}") from error

    def __enter__(self) -> Followers:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def send(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Send those records that were not sent yet."""
        self._each(lambda follower: follower.send(records))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Remember the numbers of a finished run's result, which end it at the services."""
        numbers = {name: value for name, value in result.items() if isinstance(value, (int, float))}
        self._result = {f"result/{name}": float(value) for name, value in numbers.items() if math.isfinite(value)}

    def _close(self) -> None:
        self._each(lambda follower: follower.end(self._result))

    def _each(self, do: Callable[[_Follower], object]) -> None:
        for follower in list(self._all):
            try:
                do(follower)
            except Exception as error:  # noqa: BLE001 - whatever a service raises, the run goes on
                warnings.warn(f"{follower.service} no longer follows this run: {first_line(error)}", stacklevel=2)
                self._all.remove(follower)


Opened = tuple[str, Callable[[Scalars, int], object], Callable[[Scalars], object]]


def _wandb(label: str, config: Mapping[str, Any], known: str | None, folder: Path) -> Opened:
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(
        project=project, name=label, id=known, resume="allow", config=dict(config), dir=str(folder), settings=settings
    )

    def end(numbers: Scalars) -> None:
        run.summary.update(numbers)
        run.finish()

    return run.id, lambda scalars, step: run.log(scalars, step=step), end


def _mlflow(label: str, config: Mapping[str, Any], known: str | None, folder: Path) -> Opened:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient()  # where MLFLOW_TRACKING_URI says
    if known is None:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(project)
        experiment = client.create_experiment(project) if found is None else found.experiment_id
        known = client.create_run(experiment, run_name=label).info.run_id
        flat = [Param(name, str(value)[:500]) for name, value in _flat(config)]
        client.log_batch(known, params=flat[:100])
    run = known

    def log(scalars: Scalars, step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in scalars.items()])

    def end(numbers: Scalars) -> None:
        log(numbers, 0)
        client.set_terminated(run, "FINISHED" if numbers else "KILLED")

    return run, log, end


def _trackio(label: str, config: Mapping[str, Any], known: str | None, folder: Path) -> Opened:
    import trackio

    name = known or f"{label} {time.strftime('%Y-%m-%d %H:%M:%S')}"
    run = trackio.init(project=PROJECT, name=name, resume="allow", config=dict(config), embed=False)

    def end(numbers: Scalars) -> None:
        if numbers:
            run.log(numbers)
        run.finish()

    return name, lambda scalars, step: run.log(scalars, step=step), end


def _flat(config: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


_OPEN: dict[str, Callable[[str, Mapping[str, Any], str | None, Path], Opened]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
