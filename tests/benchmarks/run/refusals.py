"""Commands that are refused with one line."""

import pytest

from lm_envs.benchmarks.cli import main


def refused(capsys, *words: str) -> str:
    """Run a command and return the line that refuses it."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    told = capsys.readouterr().err
    (said,) = [line for line in told.splitlines() if line.startswith("lm-envs: ")]
    assert stop.value.code == 1 and "Traceback" not in told
    return said
