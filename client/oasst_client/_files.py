"""Files that are whole whenever somebody reads them."""

import shutil
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, text: str) -> None:
    """The file holds `text`, in UTF-8; at no moment does it hold half of it. Its mode, and a link to it, stay."""
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
