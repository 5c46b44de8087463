"""Compiles the kernels in Triton for real cards; needs none. `python kernels_for_cards.py CAPABILITY [DTYPE [CACHE]]`

As they are launched: with tensors aligned to 16 bytes, and a bucket's block table of int64 beside a step's of int32.
Prints a kernel and its bytes of shared memory on each line. Not in a process whose Triton interprets.
"""

import sys
from collections.abc import Mapping

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
        print(name, shared_bytes(name, capability, types, sizes))
    print("attend_part", shared_bytes("attend_part", capability, types | {"blocks": "*i64"}, sizes))


def shared_bytes(name: str, capability: str, types: Mapping[str, str], sizes: Mapping[str, int]) -> int:
    kernel = getattr(paged, name)
    signature = {each: types.get(each, "constexpr") for each in kernel.arg_names}
    constants = {(number,): sizes[each] for number, each in enumerate(kernel.arg_names) if each in sizes}
    unaligned = kernel.do_not_specialize_on_alignment or ()
    hints = {
        (number,): [["tt.divisibility", 16]]
        for number, (each, of_type) in enumerate(signature.items())
        if of_type.startswith("*") and each not in unaligned
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=hints)
    return compile_kernel(source, target=GPUTarget("cuda", int(capability), 32)).metadata.shared


if __name__ == "__main__":
    main(*sys.argv[1:])
