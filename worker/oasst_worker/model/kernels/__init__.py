"""Kernels in C, compiled when a worker starts, in a second or two, by the machine's own compiler.

They are made for the very processor they run on, and nothing of them is left behind: the library is compiled in a
temporary folder, loaded, and the folder removed. Where there is no compiler the plain path serves.
"""

import ctypes
import functools
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from oasst_worker.model.inputs import BLOCK_SIZE

__all__ = ["QUERIES", "ROWS", "SIZES", "TILE", "load_kernels", "start_compiling"]

_log = logging.getLogger(__name__)

# Rows of a prompt that one task of the attention takes, and rows that share loads.
TILE = 16
QUERIES = 4

# Definitions for the kernels' sizes, and for rows of each dtype they compute with.
SIZES = (f"BLOCK={BLOCK_SIZE}", f"TILE={TILE}", f"QUERIES={QUERIES}")
ROWS = {torch.float32: (), torch.bfloat16: ("ROWS_BF16",)}

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=gnu17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")


def load_kernels(name: str, *definitions: str) -> ctypes.CDLL | None:
    """The functions of `name`.c, compiled with these preprocessor definitions; None where that cannot be done."""
    return start_compiling(name, *definitions).result()


@functools.cache
def start_compiling(name: str, *definitions: str) -> "Future[ctypes.CDLL | None]":
    """What `load_kernels` will give, without waiting for the compiler."""
    return _compilers().submit(_compile, name, definitions)


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="compiler")


def _compile(name: str, definitions: Sequence[str]) -> ctypes.CDLL | None:
    reasons: list[str] = []
    for compiler in _find_compilers():  # One may lack OpenMP where the next has it.
        try:
            return _compile_with(compiler, name, definitions)
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(f"{compiler}: {getattr(error, 'stderr', None) or error}".rstrip())
    none_found = f"no C compiler found ({', '.join(_COMPILERS)})"
    _log.warning("%s runs on the plain path: %s", name, "; ".join(reasons) or none_found)
    return None


def _find_compilers() -> Iterable[str]:
    """Each compiler there is by the first of its names."""
    found: dict[Path, str] = {}
    for path in filter(None, map(shutil.which, _COMPILERS)):
        found.setdefault(Path(path).resolve(), path)
    return found.values()


def _compile_with(compiler: str, name: str, definitions: Sequence[str]) -> ctypes.CDLL:
    """Raises OSError or SubprocessError."""
    source = Path(__file__).with_name(f"{name}.c")
    with tempfile.TemporaryDirectory(prefix="oasst-kernels-") as folder:
        library = Path(folder, f"{name}.so")
        command = [compiler, *_FLAGS, *(f"-D{each}" for each in definitions), "-o", str(library), str(source), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            hint = "is the temporary folder on a noexec mount? TMPDIR names another"
            raise OSError(f"the compiled kernel cannot be loaded: {error}; {hint}") from error
