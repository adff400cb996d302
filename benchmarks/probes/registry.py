"""The probes by name, in the order of tables and plots. A new one needs one file and one line here."""

from typing import Any

from lm_envs.benchmarks.probes.base import Probe
from lm_envs.plugins import find

PROBES: dict[str, str] = {
    "horizon": "lm_envs.benchmarks.probes.horizon:PROBE",
    "pairs": "lm_envs.benchmarks.probes.pairs:PROBE",
    "sparse": "lm_envs.benchmarks.probes.sparse:PROBE",
    "vocabulary": "lm_envs.benchmarks.probes.vocabulary:PROBE",
    "prompts": "lm_envs.benchmarks.probes.prompts:PROBE",
    "length": "lm_envs.benchmarks.probes.length:PROBE",
    "noise": "lm_envs.benchmarks.probes.noise:PROBE",
    "scale": "lm_envs.benchmarks.probes.scale:PROBE",
    "shift": "lm_envs.benchmarks.probes.shift:PROBE",
    "change": "lm_envs.benchmarks.probes.change:PROBE",
    "kl": "lm_envs.benchmarks.probes.kl:PROBE",
    "overoptimization": "lm_envs.benchmarks.probes.overoptimization:PROBE",
    "staleness": "lm_envs.benchmarks.probes.staleness:PROBE",
    "mismatch": "lm_envs.benchmarks.probes.mismatch:PROBE",
    "critic": "lm_envs.benchmarks.probes.critic:PROBE",
    "preferences": "lm_envs.benchmarks.probes.preferences:PROBE",
}


def load(name: str) -> Probe:
    """Return a probe: a key of :data:`PROBES`, or one of your own, ``FILE.py:NAME`` or ``module:NAME``.

    Raises:
        ValueError: there is none (the message suggests names), or it is no probe.
    """

    def is_probe(found: Any) -> bool:
        return isinstance(found, Probe)

    probe: Probe = find(name, "probe", PROBES, is_probe, "a lm_envs.benchmarks.probes.base.Probe")
    return probe
