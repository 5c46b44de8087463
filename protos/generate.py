"""Generates the Python code beside every .proto file: `python protos/generate.py [DIRECTORY]`.

Without a directory the code lands where it is checked in. A test generates it anew and compares.
"""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

_ROOT = Path(__file__).parent


def generate(output: Path) -> None:
    """Messages, their type stubs, and service stubs for the files that declare services, below `output`."""
    sources = sorted(_ROOT.glob("oasst/**/*.proto"))
    services = [source for source in sources if "\nservice " in source.read_text()]
    _protoc(sources, f"--python_out={output}", f"--pyi_out={output}")
    _protoc(services, f"--grpc_python_out={output}")


def _protoc(sources: list[Path], *options: str) -> None:
    well_known = files("grpc_tools") / "_proto"
    names = [str(source.relative_to(_ROOT)) for source in sources]
    if protoc.main(["protoc", f"-I{_ROOT}", f"-I{well_known}", *options, *names]):
        raise SystemExit(f"protoc failed on {', '.join(names)}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else _ROOT)
