"""Attention in Triton over a KV cache in blocks that lie anywhere, for GPUs.

A layer's cache is [blocks, 2, heads, block_size, head_dim], keys before values, so that a block of one head is one run
of memory. What a step attends to is told by numbers alone: `blocks` holds the blocks of all sequences, one sequence's
behind another's, and a block start says where those of one begin.

No program knows of a second sequence, and every sum has one order:

- A generated token's positions are cut into parts of a fixed length, counted from the first position
  (`attend_part`); the parts are joined in ascending order (`join_parts`). How many parts there are depends on the
  token's own position, so its bits do not depend on the batch.
- A prompt's positions attend in tiles (`attend_tile`), each to all keys from the first one on, `keys` at a time. A row
  of a product takes nothing from the other rows.

A cache of bytes holds e4m3, fp8 with three bits of mantissa. It is narrowed and widened here by operations on bits, not
by Triton's own type, which there is only from capability 8.9 on; every number of e4m3 is one of fp16 and of bf16 too.

Sums, softmax and rotation are fp32, whatever the rows are. Dimensions are padded to `dims`, a power of two of at
least 16, because Triton's vectors are.

Triton compiles a kernel anew for a pointer that is not aligned to 16 bytes, and for some values of a number. It may not
where arguments change so between steps, and are read one by one anyway: no step may wait for a compiler.
"""

import triton
import triton.language as tl

__all__ = ["attend_part", "attend_tile", "join_parts", "write_rows"]


@triton.jit
def to_cache(x, dtype: tl.constexpr):
    """fp32 as it stands in a cache of `dtype`."""
    return to_e4m3(x) if dtype == tl.uint8 else x.to(dtype)


@triton.jit
def from_cache(stored, dtype: tl.constexpr):
    """What a cache holds, in `dtype`."""
    return from_e4m3(stored).to(dtype) if stored.dtype == tl.uint8 else stored.to(dtype)


@triton.jit
def to_e4m3(x):
    """fp32 as seeeemmm, a bias of 7 and no infinity: rounded to the nearest and ties to even, +-448 what is too large.

    What is not finite becomes NaN.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bounded = tl.minimum(magnitude, 0x43E00000)  # 448
    # From 2^-6 on: 20 of 23 bits of mantissa are rounded off, a carry goes into the exponent, whose bias was 127.
    normal = ((bounded + 0x7FFFF + ((bounded >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below: a multiple of 2^-9, which is the last bit of 2^14, so that the addition rounds.
    subnormal = (bounded.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    narrow = tl.where(magnitude < 0x3C800000, subnormal, normal)  # 2^-6
    narrow = tl.where(magnitude < 0x7F800000, narrow, 0x7F)
    return (narrow | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(stored):
    """fp32, exactly."""
    byte = stored.to(tl.int16)
    magnitude = byte & 0x7F
    # As bits of fp16, whose bias is 15, the number times 2^-8. Only NaN's carry reaches the eighth bit; there it fills
    # the exponent of fp16.
    bits = ((byte & 0x80) << 8) | ((magnitude | ((magnitude + 1) & 0x80)) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit(do_not_specialize_on_alignment=["positions", "cells"])
def write_rows(
    qkv,  # [rows, 3 * heads * head_dim]
    cos,  # [max_positions, rotary_dim] fp32
    sin,
    positions,  # [rows] int64
    cells,  # [rows] int64, block * block_size + offset
    queries,  # [rows, heads, head_dim], written: rotated queries
    cache,  # Written: each row's key, rotated, and value; in their dtype, or bytes of e4m3.
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    dims: tl.constexpr,
    block_size: tl.constexpr,
    heads_at_once: tl.constexpr,
):
    """One row and some of its heads for each program: grid (rows, heads / heads_at_once rounded up)."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * heads_at_once + tl.arange(0, heads_at_once))[:, None]
    dim = tl.arange(0, dims)[None, :]
    exists = (head < heads) & (dim < head_dim)
    # The halves of the rotated dimensions turn against each other.
    is_rotated = dim < rotary_dim
    is_first_half = dim < rotary_dim // 2
    partner = tl.where(is_first_half, dim + rotary_dim // 2, dim - rotary_dim // 2)
    has_partner = (head < heads) & is_rotated
    angle = tl.load(positions + row) * rotary_dim + dim
    cosine = tl.load(cos + angle, mask=is_rotated, other=1.0)
    sine = tl.load(sin + angle, mask=is_rotated, other=0.0)
    sine = tl.where(is_first_half, -sine, sine)

    query = qkv + (row * 3 * heads + head) * head_dim
    plain = tl.load(query + dim, mask=exists, other=0.0).to(tl.float32)
    turned = tl.load(query + partner, mask=has_partner, other=0.0).to(tl.float32)
    to_query = queries + (row * heads + head) * head_dim + dim
    tl.store(to_query, (plain * cosine + turned * sine).to(queries.dtype.element_ty), mask=exists)

    cell = tl.load(cells + row)
    to_key = cache + ((cell // block_size * 2 * heads + head) * block_size + cell % block_size) * head_dim + dim
    key = query + heads * head_dim
    plain = tl.load(key + dim, mask=exists, other=0.0).to(tl.float32)
    turned = tl.load(key + partner, mask=has_partner, other=0.0).to(tl.float32)
    tl.store(to_key, to_cache(plain * cosine + turned * sine, cache.dtype.element_ty), mask=exists)
    value = tl.load(key + heads * head_dim + dim, mask=exists).to(tl.float32)
    tl.store(to_key + heads * block_size * head_dim, to_cache(value, cache.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize_on_alignment=["positions", "rows", "block_starts", "blocks", "peaks", "weights"])
def attend_part(
    queries,  # [rows, heads, head_dim]
    cache,
    positions,  # [rows] int64
    rows,  # [tokens] int32: the rows that attend by themselves
    block_starts,  # [tokens] int32
    blocks,  # int32 or int64
    sums,  # [tokens, heads, parts, head_dim] fp32, written: values weighted by e^(score - peak)
    peaks,  # [tokens, heads, parts] fp32, written: the highest score, in powers of two
    weights,  # [tokens, heads, parts] fp32, written: the sum of the weights
    scale,  # Of the scores; makes them powers of two.
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    dims: tl.constexpr,
    block_size: tl.constexpr,
    part_size: tl.constexpr,
    keys: tl.constexpr,
):
    """One token, head and part of its positions for each program: grid (tokens, heads, parts)."""
    token, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + token).to(tl.int64)
    length = tl.load(positions + row).to(tl.int32) + 1
    first = part * part_size
    if first >= length:
        return
    end = tl.minimum(first + part_size, length)
    block_start = tl.load(block_starts + token)
    dim = tl.arange(0, dims)
    exists = dim < head_dim
    query = tl.load(queries + (row * heads + head) * head_dim + dim, mask=exists, other=0.0).to(tl.float32) * scale

    peak = -float("inf")
    weight = 0.0
    attended = tl.zeros([dims], dtype=tl.float32)
    for start in range(first, end, keys):
        position = start + tl.arange(0, keys)
        is_own = position < end
        block = tl.load(blocks + block_start + position // block_size, mask=is_own, other=0).to(tl.int64)
        cell = (block * 2 * heads + head) * block_size + position % block_size
        here = cell[:, None] * head_dim + dim[None, :]
        is_read = is_own[:, None] & exists[None, :]
        key = from_cache(tl.load(cache + here, mask=is_read, other=0), tl.float32)
        scores = tl.where(is_own, tl.sum(key * query[None, :], axis=1), -float("inf"))
        value = from_cache(tl.load(cache + here + heads * block_size * head_dim, mask=is_read, other=0), tl.float32)
        higher = tl.maximum(peak, tl.max(scores, axis=0))
        faded = tl.exp2(peak - higher)
        shares = tl.exp2(scores - higher)
        weight = weight * faded + tl.sum(shares, axis=0)
        attended = attended * faded + tl.sum(shares[:, None] * value, axis=0)
        peak = higher

    at = (token.to(tl.int64) * heads + head) * tl.num_programs(2) + part
    tl.store(sums + at * head_dim + dim, attended, mask=exists)
    tl.store(peaks + at, peak)
    tl.store(weights + at, weight)


@triton.jit(do_not_specialize=["num_parts"], do_not_specialize_on_alignment=["peaks", "weights", "positions", "rows"])
def join_parts(
    sums,
    peaks,
    weights,
    positions,
    rows,
    attended,  # [rows, heads * head_dim], written
    num_parts,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    dims: tl.constexpr,
    part_size: tl.constexpr,
):
    """What `attend_part` left, one token and head for each program: grid (tokens, heads)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + token).to(tl.int64)
    length = tl.load(positions + row).to(tl.int32) + 1
    dim = tl.arange(0, dims)
    exists = dim < head_dim
    first = (token * heads + head) * num_parts

    peak = -float("inf")
    weight = 0.0
    total = tl.zeros([dims], dtype=tl.float32)
    for part in range(0, tl.cdiv(length, part_size)):
        at = first + part
        of_part = tl.load(peaks + at)
        higher = tl.maximum(peak, of_part)
        faded, share = tl.exp2(peak - higher), tl.exp2(of_part - higher)
        weight = weight * faded + tl.load(weights + at) * share
        total = total * faded + tl.load(sums + at * head_dim + dim, mask=exists, other=0.0) * share
        peak = higher
    outcome = (total / weight).to(attended.dtype.element_ty)
    tl.store(attended + (row * heads + head) * head_dim + dim, outcome, mask=exists)


@triton.jit(do_not_specialize_on_alignment=["positions", "tiles", "blocks"])
def attend_tile(
    queries,  # [rows, heads, head_dim]
    cache,
    positions,  # [rows] int64
    tiles,  # [tiles, 3] int32: first row, number of rows, block start
    blocks,  # int32
    attended,  # [rows, heads * head_dim], written
    scale,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    dims: tl.constexpr,
    block_size: tl.constexpr,
    tile_size: tl.constexpr,
    keys: tl.constexpr,
):
    """Positions of one prompt that follow each other, and a head, for each program: grid (tiles, heads)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(tiles + 3 * tile).to(tl.int64)
    num_rows = tl.load(tiles + 3 * tile + 1)
    block_start = tl.load(tiles + 3 * tile + 2)
    offset = tl.arange(0, tile_size)
    dim = tl.arange(0, dims)
    exists = dim < head_dim
    here = ((first_row + offset) * heads + head)[:, None] * head_dim + dim[None, :]
    is_row = (offset < num_rows)[:, None] & exists[None, :]
    query = tl.load(queries + here, mask=is_row, other=0.0)
    own = tl.load(positions + first_row).to(tl.int32) + offset
    end = tl.load(positions + first_row).to(tl.int32) + num_rows

    peak = tl.full([tile_size], -float("inf"), dtype=tl.float32)
    weight = tl.zeros([tile_size], dtype=tl.float32)
    total = tl.zeros([tile_size, dims], dtype=tl.float32)
    for start in range(0, end, keys):
        position = start + tl.arange(0, keys)
        is_written = position < end
        block = tl.load(blocks + block_start + position // block_size, mask=is_written, other=0).to(tl.int64)
        cell = (block * 2 * heads + head) * block_size + position % block_size
        there = cell[:, None] * head_dim + dim[None, :]
        is_read = is_written[:, None] & exists[None, :]
        key = from_cache(tl.load(cache + there, mask=is_read, other=0), query.dtype)
        value = from_cache(tl.load(cache + there + heads * block_size * head_dim, mask=is_read, other=0), query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(position[None, :] <= own[:, None], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        faded = tl.exp2(peak - higher)
        shares = tl.exp2(scores - higher[:, None])
        weight = weight * faded + tl.sum(shares, axis=1)
        total = total * faded[:, None] + tl.dot(shares.to(value.dtype), value, input_precision="ieee")
        peak = higher
    tl.store(attended + here, (total / weight[:, None]).to(attended.dtype.element_ty), mask=is_row)
