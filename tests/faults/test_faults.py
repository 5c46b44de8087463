"""The quick rows of the fault table, once each. `make faults` runs all of them, with many seeds."""

from pathlib import Path

import pytest

from faults.load import FaultMissedError
from faults.rows import ROWS
from faults.runs import run_until_met
from faults.table import Row

QUICK = [row for row in ROWS if row.is_quick]


@pytest.mark.timeout(1000)  # There may be three runs, and each ends by itself after 300 s.
@pytest.mark.parametrize("row", QUICK, ids=[f"row-{row.number}" for row in QUICK])
async def test_the_promise_holds_when_it_happens_under_load(row: Row, tmp_path: Path) -> None:
    try:
        result = await run_until_met(row, 1, [], keep_failed_in=tmp_path)
    except FaultMissedError as error:
        pytest.skip(f"the fault met no stream, three times: {error}")
    assert result.num_tokens > 0


def test_every_row_has_a_number_of_its_own() -> None:
    assert len({row.number for row in ROWS}) == len(ROWS)
