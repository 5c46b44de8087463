"""The guards that `make faults` takes out are still where they are looked for."""

from pathlib import Path

import pytest

from faults.mutations import MUTATIONS, Mutation, mutate


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.guard for mutation in MUTATIONS])
def test_a_guard_can_be_taken_out_of_a_copy(mutation: Mutation, tmp_path: Path) -> None:
    text = (mutate(mutation, tmp_path) / mutation.package.__name__ / mutation.file).read_text()
    assert mutation.mutated in text
    assert mutation.original not in text
