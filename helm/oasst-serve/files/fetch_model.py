"""Fetches one revision of a model from a hub into a folder and checks every file's SHA-256.

Run by an init container, so that a worker starts on exactly the files that were named, or not at all. Files that were
checked before and have not changed since are not read again. What is not wanted goes first: the folder need not have
room for two revisions.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download

_CHECKED = ".checked.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--file", required=True, action="append", dest="files", metavar="NAME=SHA256")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = dict(file.rsplit("=", 1) for file in options.files)
    checked = _read_checked(options.folder)
    _remove_others(options.folder, wanted)
    for name, sha256 in wanted.items():
        path = options.folder / name
        if name in checked and checked[name] == _describe(path, sha256):
            continue
        if not path.exists() or _sha256(path) != sha256:
            print(f"fetching {name}", flush=True)
            path.unlink(missing_ok=True)
            hf_hub_download(options.repository, name, revision=options.revision, local_dir=options.folder)
            if (found := _sha256(path)) != sha256:
                path.unlink()
                print(f"{name}: its SHA-256 is {found}, not {sha256}; it was removed", file=sys.stderr)
                return 1
        checked[name] = _describe(path, sha256)
        (options.folder / _CHECKED).write_text(json.dumps(checked))
        print(f"checked {name}", flush=True)
    return 0


def _read_checked(folder: Path) -> dict[str, object]:
    try:
        return dict(json.loads((folder / _CHECKED).read_text()))
    except (OSError, ValueError):
        return {}


def _describe(path: Path, sha256: str) -> object:
    """What tells a file that was checked from one that has changed since; None if there is none."""
    if not path.exists():
        return None
    status = path.stat()
    return [sha256, status.st_size, status.st_mtime_ns]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_others(folder: Path, wanted: dict[str, str]) -> None:
    """Weights of another revision would be found beside the wanted ones, and no download goes on with half a file."""
    for path in folder.iterdir():
        if path.is_file() and path.name not in wanted and path.name != _CHECKED:
            path.unlink()
    for path in folder.rglob("*.incomplete"):
        path.unlink()


if __name__ == "__main__":
    sys.exit(main())
