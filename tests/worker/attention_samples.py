"""One layer's attention to random rows."""

import pytest
import torch
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import BLOCK_SIZE, AttentionSpan, StepInputs

NUM_BLOCKS = 64


def require_triton() -> None:
    """Skips the test where Triton's kernels cannot run: before 3.7 its interpreter fails with NumPy 2.4."""
    version = None if torch.cuda.is_available() else "3.7"
    pytest.importorskip("triton", minversion=version, reason="no Triton that runs here: `make test-triton` installs it")


def make_config(head_dim: int, rotary_dim: int, num_heads: int = 3) -> NeoXConfig:
    return NeoXConfig(
        hidden_size=num_heads * head_dim,
        num_heads=num_heads,
        num_layers=1,
        vocab_size=10,
        head_dim=head_dim,
        intermediate_size=8,
        rotary_dim=rotary_dim,
        rotary_base=10000.0,
        max_positions=1024,
        parallel_residual=True,
        layer_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_bias=True,
        hidden_act="gelu",
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=1,
        dtype=torch.float32,
    )


def make_inputs(
    chunks: list[tuple[int, int, list[int]]], prompt_end: int = 1024, device: torch.device | None = None
) -> StepInputs:
    """Rows of the chunks (start, end, blocks); positions from `prompt_end` on are generated."""
    spans, positions, cells = [], [], []
    for start, end, blocks in chunks:
        num_prompt_rows = max(0, min(end, prompt_end) - start)
        spans.append(AttentionSpan(len(positions), end - start, start, num_prompt_rows, blocks))
        positions += range(start, end)
        cells += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, end)]
    none = torch.zeros(len(positions), dtype=torch.int64)
    inputs = StepInputs(none, torch.tensor(positions), torch.tensor(cells), spans, none)
    return inputs.to(device) if device else inputs


def make_unread_cache(attention) -> torch.Tensor:
    """Nothing may be read before it was written: numbers are NaN, and as scales of int8 these bytes are."""
    cache = attention.make_cache(NUM_BLOCKS)
    return cache.fill_(torch.nan if cache.is_floating_point() else -1)


def attend_in_chunks(
    attention, qkv: torch.Tensor, borders: list[int], blocks: list[int], prompt_end: int = 1024
) -> torch.Tensor:
    """One sequence's rows, cut at these borders."""
    cache = make_unread_cache(attention)
    outcomes = [
        attention.prepare(make_inputs([(start, end, blocks)], prompt_end, qkv.device))(qkv[start:end].clone(), cache[0])
        for start, end in zip([0, *borders], [*borders, len(qkv)], strict=True)
    ]
    return torch.cat(outcomes)
