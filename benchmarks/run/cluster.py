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
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.inputs import fingerprints, versions
from lm_envs.benchmarks.run.suites import Resources, RunSpec
from lm_envs.benchmarks.run.workers import LOG, Notify, StopRequest, attempt
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


def _carry_out(driver: _Driver, mailbox: Any, spec: RunSpec, options: dict[str, Any]) -> dict[str, Any]:
    """The task: carry out a run on this node; return its last event, or "left" if it was to stop before it began."""
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

    before = os.dup(1), os.dup(2)
    try:
        return attempt(spec, driver.out, True, **options, notify=notify, should_stop=should_stop)
    except BaseException:  # a bug: raised again
        traceback.print_exc()  # into the run's log
        raise
    finally:
        for mine, theirs in enumerate(before, 1):
            os.dup2(theirs, mine)
            os.close(theirs)


@contextlib.contextmanager
def joined(
    address: str, out: Path, specs: Sequence[RunSpec], resources: Resources, threads: int
) -> Iterator[ClusterRuns]:
    """Connect to a Ray cluster ("auto" for the one of this machine) and check its nodes.

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
        driver = _Driver(out.resolve(), token, content, os.getcwd(), tuple(sys.path), versions(), inputs)
        runs = ClusterRuns(driver, resources, cpus)
        runs.check_nodes(specs)
        yield runs
    finally:
        ray.shutdown()  # ends the tasks that still run
        (out / token).unlink(missing_ok=True)


def _check_devices(specs: Sequence[RunSpec], resources: Resources) -> None:
    for spec in specs:
        device = str(spec.options.get("device", ""))
        if device.startswith("cuda") and not resources.gpus:
            raise UserError(f"{spec.label} asks for {device} and its task for no GPU: set gpus under [resources]")


class ClusterRuns:
    """Carries out runs on a cluster that was joined."""

    def __init__(self, driver: _Driver, resources: Resources, cpus: int) -> None:
        import ray

        self.driver, self._ray, self._needs = driver, ray, {"CPU": cpus, "GPU": resources.gpus}
        self._needs["memory"] = resources.memory * _GB
        self._asked = {"num_cpus": cpus, "num_gpus": resources.gpus, "memory": int(resources.memory * _GB)}
        self._task = ray.remote(_carry_out)
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

    def carry_out(
        self, specs: Sequence[RunSpec], out: Path, *, notify: Notify, stop: StopRequest, **options: Any
    ) -> None:
        """Carry out runs, as many at a time as the cluster has resources for; as
        :func:`~lm_envs.benchmarks.run.workers.run_in_workers`. The run of a lost node goes on elsewhere, from its last
        checkpoint."""
        under_way = {self._submit(spec, options): spec for spec in specs}
        placed: dict[str, str] = {}  # nodes by run
        lost: list[RunSpec] = []
        asked = False
        while under_way or (lost and not stop.requested):
            if stop.requested and not asked:
                asked = True
                self._ray.get(self._mailbox.stop.remote())
            ready, _ = self._ray.wait(list(under_way), num_returns=len(under_way), timeout=_POLL_S)
            for event in self._ray.get(self._mailbox.take.remote()):
                if event["event"] == "placed":
                    placed[event["run"]] = event["node"]
                else:
                    notify(event)
            for task in ready:
                spec = under_way.pop(task)
                event = self._ended(task, spec)
                if event["event"] == "lost" and not stop.requested:
                    notify(event)
                    lost.append(spec)
                elif event["event"] not in ("lost", "left"):
                    notify(event)
                if event.get("fatal"):
                    stop.requested = True
            if lost:  # only when the whole cluster knows: a task that is sent to a dead node waits for ever
                time.sleep(_POLL_S)
                alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
                for spec in [spec for spec in lost if placed.get(spec.label) not in alive and not stop.requested]:
                    lost.remove(spec)
                    under_way[self._submit(spec, options)] = spec

    def _submit(self, spec: RunSpec, options: dict[str, Any]) -> Any:
        # The driver sends a lost node's run again itself: Ray would also repeat one whose process was killed.
        task = self._task.options(**self._asked, name=spec.label, max_retries=0)
        return task.remote(self.driver, self._mailbox, spec, options)

    def _ended(self, task: Any, spec: RunSpec) -> dict[str, Any]:
        """The last event of a run whose task ended."""
        errors = self._ray.exceptions
        failed = {"event": "failed", "run": spec.label, "fatal": False}
        said = f"what it said is in {self.driver.out / spec.folder / LOG}"
        try:
            event: dict[str, Any] = self._ray.get(task)
            return event
        except errors.NodeDiedError:
            return {"event": "lost", "run": spec.label}
        except errors.OutOfMemoryError:
            memory = "Ray ended it because its node's memory ran out: raise memory under [resources]"
            return {**failed, "message": f"{memory}; {said}"}
        except errors.RayError as error:
            return {**failed, "message": f"its task ended with {_cause(error)}; {said}"}


def _cause(error: Exception) -> str:
    """One line with the last line of Ray's report, which names the error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1] if lines else type(error).__name__, 300)
