"""The list of mutations is in date; running them all is `make mutants`."""

from pathlib import Path

import pytest

from tests.mutations import CHECKOUT, MUTATIONS, Mutation, broken


def test_there_are_enough_and_no_two_are_alike():
    assert len(MUTATIONS) >= 30
    assert len({m.name for m in MUTATIONS}) == len({(m.file, m.old, m.new) for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_each_breaks_one_place_of_a_file_and_names_tests_that_exist(mutation):
    text = (CHECKOUT / mutation.file).read_text(encoding="utf-8")
    changed = broken(mutation, text)
    assert changed != text
    compile(changed, mutation.file, "exec")
    for selection in mutation.tests.split():
        file, colons, name = selection.partition("::")
        before, found, _ = Path(CHECKOUT / file).read_text(encoding="utf-8").partition(f"def {name}")
        assert found and bool(colons) == bool(name)
        assert not name or "pytest.mark.slow\n" not in before.rpartition("\n\n\n")[2], "the quick suite leaves it out"


def test_a_text_that_is_gone_is_reported():
    with pytest.raises(ValueError, match="stands 0 times"):
        broken(Mutation("x", "f", "gone", "", ""), "here")
