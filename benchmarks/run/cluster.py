"""Runs on a Ray cluster: each run is a task with declared resources, carried out on whichever node has them free.

The driver sends a run's settings and gets its events; everything else is in the output folder, which all nodes see. Ray
is imported only where a command says ``--ray``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.inputs import fingerprints, versions
from lm_envs.benchmarks.run.suites import Resources, RunSpec
from lm_envs.benchmarks.run.workers import (
    LAST,
    CarryOut,
    Event,
    Notify,
    StopRequest,
    attempt,
    failed,
    run_in_workers,
    several_at_a_time,
)
from lm_envs.files import TEMPORARY, write_atomic
from lm_envs.printable import one_line

_ANSWER_S = 300  # within which a node must have answered whether runs can go there
_POLL_S = 0.2
_GB = 10**9


@dataclass(frozen=True)
class _Driver:
    """What a node must share with the driver for its runs to be the same there."""

    out: Path
    token: str
    content: str
    folder: str  # relative paths of plug-ins and data start here
    path: tuple[str, ...]
    versions: dict[str, str]
    inputs: dict[str, dict[str, str]]  # fingerprints by the run's label
    shared: tuple[int, bool] = (1, False)  # by how many processes, and whether they share out the weights

    def complaint(self, specs: Sequence[RunSpec]) -> str | None:
        """On a node: go to the driver's folder; return why runs cannot be carried out here, None if they can."""
        try:
            found = (self.out / self.token).read_text()
        except OSError:
            found = None
        if found != self.content:
            return f"it does not see the folder {self.out}: choose an --out on a file system that all nodes share"
        with contextlib.suppress(OSError):  # a file that is missed has its own message
            os.chdir(self.folder)
        sys.path += [place for place in self.path if place not in sys.path]
        if other := [name for name, mine in self.versions.items() if versions().get(name) != mine]:
            here, mine = versions().get(other[0]), self.versions[other[0]]
            return f"it has {other[0]} {here} and the driver has {mine}: install the same on both"
        for spec in specs:
            seen = fingerprints(spec)
            for name, hashed in self.inputs[spec.label].items():
                if seen.get(name) != hashed:
                    state = "other contents of" if name in seen else "no"
                    return f"it has {state} {name}: keep what runs read on a file system that all nodes share"
        return None


class _Mailbox:
    """An actor beside the driver: the events of all runs, and whether they have to stop."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.stopping = False

    def put(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        taken, self.events = self.events, []
        return taken

    def stop(self) -> None:
        self.stopping = True

    def asked(self) -> bool:
        return self.stopping


def _complaint(driver: _Driver, specs: Sequence[RunSpec]) -> str | None:
    return driver.complaint(specs)


def _carry_out(driver: _Driver, mailbox: Any, spec: RunSpec, options: dict[str, Any]) -> Event:
    """The task: carry out a run on this node; return its last event."""
    import ray
    from transformers.utils.logging import disable_progress_bar

    if ray.get(mailbox.asked.remote()):
        return {"event": "left", "run": spec.label}
    if (why := driver.complaint([spec])) is not None:
        message = f"the node {ray.util.get_node_ip_address()} cannot carry it out: {why}"
        return {"event": "failed", "run": spec.label, "message": message, "fatal": False}
    disable_progress_bar()
    here = ray.get_runtime_context().get_node_id()
    ray.get(mailbox.put.remote({"event": "placed", "run": spec.label, "node": here}))

    def notify(event: dict[str, Any]) -> None:
        ray.get(mailbox.put.remote(event))

    def should_stop() -> bool:
        return bool(ray.get(mailbox.asked.remote()))

    if driver.shared[0] == 1:
        return attempt(spec, driver.out, True, **options, notify=notify, should_stop=should_stop)
    last, stop = [], StopRequest()

    def pass_on(event: Event) -> None:
        if event["event"] in LAST:
            last.append(event)
        else:
            notify(event)
            stop.requested = should_stop()

    run_in_workers([spec], driver.out, jobs=1, notify=pass_on, stop=stop, shared=driver.shared, **options)
    return last[0]


@contextlib.contextmanager
def joined(address: str, out: Path, specs: Sequence[RunSpec], resources: Resources, threads: int) -> Iterator[CarryOut]:
    """Connect to a Ray cluster ("auto" for the one of this machine) and check its nodes; yield what carries out runs,
    as many at a time as the cluster has resources for.

    Raises:
        UserError: no Ray, no cluster, no node that is large enough, or one that does not see ``out``, has other
            versions or reads other files.
    """
    if find_spec("ray") is None:
        raise UserError("--ray needs Ray: pip install 'lm-envs[ray]'")
    _check_devices(specs, resources)
    import ray

    cpus = resources.cpus or threads
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:  # other versions are a RuntimeError
        start = "start one (ray start --head; on the others ray start --address=HOST:6379)"
        raise UserError(f"cannot join the Ray cluster {address!r}: {one_line(str(error), 300)}; {start}") from error
    token, content = f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-token", secrets.token_hex(16)
    try:
        write_atomic(out / token, content)
        inputs = {spec.label: fingerprints(spec) for spec in specs}
        about = (out.resolve(), token, content, os.getcwd(), tuple(sys.path), versions(), inputs)
        driver = _Driver(*about, (resources.processes, resources.fsdp))
        cluster = _Cluster(driver, resources, cpus)
        cluster.check_nodes(specs)

        def carry_out(
            specs: Sequence[RunSpec], out: Path, *, notify: Notify, stop: StopRequest, **options: Any
        ) -> None:
            cluster.options = options
            several_at_a_time(cluster, specs, notify=notify, stop=stop)

        yield carry_out
    finally:
        ray.shutdown()  # ends the tasks that still run
        (out / token).unlink(missing_ok=True)


def _check_devices(specs: Sequence[RunSpec], resources: Resources) -> None:
    for spec in specs:
        device = str(spec.options.get("device", ""))
        if device.startswith("cuda") and not resources.gpus:
            raise UserError(f"{spec.label} asks for {device} and its task for no GPU: set gpus under [resources]")


class _Cluster:
    """A cluster that was joined. Ray itself keeps runs waiting that it has no room for."""

    room = sys.maxsize

    def __init__(self, driver: _Driver, resources: Resources, cpus: int) -> None:
        import ray

        self.driver, self._ray = driver, ray
        each = {"CPU": cpus, "GPU": resources.gpus, "memory": int(resources.memory * _GB)}
        self._needs = {kind: least * resources.processes for kind, least in each.items()}
        cores, gpus, memory = self._needs.values()
        self._asked_for = {"num_cpus": cores, "num_gpus": gpus, "memory": memory}
        self._task = ray.remote(_carry_out)
        self._placed: dict[str, str] = {}  # nodes by run
        self._under_way: dict[Any, RunSpec] = {}
        self._stopping = False
        self.options: dict[str, Any] = {}
        here = ray.get_runtime_context().get_node_id()
        self._mailbox: Any = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=self._on(here)).remote()

    def _on(self, node: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node_id=node, soft=False)

    def _nodes(self) -> dict[str, str]:
        """The addresses of the nodes that are alive and large enough for a run, by their ids."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        fits = [n for n in alive if all(n["Resources"].get(kind, 0) >= least for kind, least in self._needs.items())]
        return {node["NodeID"]: node["NodeManagerAddress"] for node in fits}

    def check_nodes(self, specs: Sequence[RunSpec]) -> None:
        """Raise UserError unless a run fits somewhere, and every node on which one fits can carry it out."""
        if not (nodes := self._nodes()):
            most = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            have = "; ".join(", ".join(f"{kind} {has.get(kind, 0):g}" for kind in self._needs) for has in most)
            needs = ", ".join(f"{kind} {least:g}" for kind, least in self._needs.items() if least)
            raise UserError(f"no node of the cluster has what a run takes ({needs}); they have {have}")
        one_of_each = list({(spec.task, spec.algorithm): spec for spec in specs}.values())
        look = self._ray.remote(_complaint)
        asked = [
            look.options(num_cpus=0, max_retries=0, scheduling_strategy=self._on(node)).remote(self.driver, one_of_each)
            for node in nodes
        ]
        for address, answer in zip(nodes.values(), asked, strict=True):
            try:
                why = self._ray.get(answer, timeout=_ANSWER_S)
            except self._ray.exceptions.RayError as error:
                why = f"it cannot run lm-envs: {_cause(error)}"
            if why is not None:
                raise UserError(f"the Ray node {address} cannot take part: {why}")

    def begin(self, job: RunSpec) -> None:
        # The driver sends a lost node's run again itself: Ray would also repeat one whose process was killed.
        task = self._task.options(**self._asked_for, name=job.label, max_retries=0)
        self._under_way[task.remote(self.driver, self._mailbox, job, self.options)] = job

    def events(self) -> Iterator[Event]:
        ended, _ = self._ray.wait(list(self._under_way), num_returns=len(self._under_way), timeout=_POLL_S)
        for event in self._ray.get(self._mailbox.take.remote()):
            if event["event"] == "placed":
                self._placed[event["run"]] = event["node"]
            else:
                yield event
        for task in ended:
            yield from self._last(task, self._under_way.pop(task))

    def ask(self) -> None:
        self._stopping = True
        self._ray.get(self._mailbox.stop.remote())

    def _last(self, task: Any, spec: RunSpec) -> Iterator[Event]:
        """The last event of a run whose task ended; or "lost", and it begins again elsewhere."""
        errors = self._ray.exceptions
        try:
            yield self._ray.get(task)
        except errors.NodeDiedError:
            if self._stopping:
                yield {"event": "left", "run": spec.label}
                return
            yield {"event": "lost", "run": spec.label}
            # Only when the whole cluster knows: a task that is sent to a dead node waits for ever.
            while self._placed.get(spec.label) in [node["NodeID"] for node in self._ray.nodes() if node["Alive"]]:
                time.sleep(_POLL_S)
            self.begin(spec)
        except errors.OutOfMemoryError:
            memory = "was ended by Ray because its node's memory ran out: raise memory under [resources]"
            yield failed(spec, self.driver.out, memory)
        except errors.RayError as error:
            yield failed(spec, self.driver.out, f"ended with {_cause(error)}")


def _cause(error: Exception) -> str:
    """One line with the last line of Ray's report, which names the error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1] if lines else type(error).__name__, 300)
