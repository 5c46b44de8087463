"""Files of JSON, one value a line."""

import gzip
from collections.abc import Iterator
from pathlib import Path

__all__ = ["numbered_lines"]


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1. The file is gzipped if its name ends in `.gz`.

    Lines end as files' do, and not at U+2028 or the like, which a JSON string may hold as they are.
    """
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line
