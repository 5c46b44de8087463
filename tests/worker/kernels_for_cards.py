"""Compiles the kernels in Triton for real cards; needs none. `python kernels_for_cards.py CAPABILITY [DTYPE [CACHE]]`

Prints a kernel and its bytes of shared memory on each line. Not in a process whose Triton interprets.
"""

import sys

from oasst_worker.model.kernels import paged
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Of the 12 B model.
SIZES = {
    "heads": 40,
    "head_dim": 128,
    "rotary_dim": 32,
    "dims": 128,
    "block_size": 16,
    "heads_at_once": 8,
    "part_size": 128,
    "tile_size": 64,
}
NUMBERS = {"scale": "fp32", "num_parts": "i32"}
POINTERS = {
    **dict.fromkeys(("positions", "cells"), "*i64"),
    **dict.fromkeys(("rows", "block_starts", "tiles", "blocks"), "*i32"),
    **dict.fromkeys(("cos", "sin", "sums", "peaks", "weights"), "*fp32"),
}


def main(capability: str, dtype: str = "fp16", cache_dtype: str | None = None) -> None:
    sizes = SIZES | {"keys": 32 if dtype == "fp32" else 64}
    types = {**POINTERS, **NUMBERS, **dict.fromkeys(("qkv", "queries", "attended"), f"*{dtype}")}
    types["cache"] = f"*{cache_dtype or dtype}"
    for name in paged.__all__:
        kernel = getattr(paged, name)
        constants = {(number,): sizes[each] for number, each in enumerate(kernel.arg_names) if each in sizes}
        signature = {each: types.get(each, "constexpr") for each in kernel.arg_names}
        compiled = compile_kernel(
            ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", int(capability), 32)
        )
        print(name, compiled.metadata.shared)


if __name__ == "__main__":
    main(*sys.argv[1:])
