"""An engine without tensors: its cache holds token ids, and a token is a function of those before it."""

import zlib
from array import array
from collections.abc import Callable, Sequence

from oasst_worker.engine import Batch, Engine, EngineConfig, GenerationParams, Sample, TokenOutput

__all__ = ["EOS", "VOCABULARY", "TokenCacheExecutor", "expected_tokens", "make_engine", "next_token", "run_to_end"]

EOS = 0
VOCABULARY = 50

# What follows these tokens.
NextToken = Callable[[Sequence[int]], int]


def next_token(token_ids: Sequence[int]) -> int:
    return zlib.crc32(array("q", token_ids).tobytes()) % VOCABULARY


class TokenCacheExecutor:
    """Keeps a cache of token ids instead of keys and values, and draws only from what the cache holds."""

    prefill_tile = 4

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 4,
        *,
        is_position_exact: bool = True,
        next_token: NextToken = next_token,
    ) -> None:
        self.is_position_exact = is_position_exact
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.next_token = next_token
        self.cache: list[int | None] = [None] * (num_blocks * block_size)
        self.broken: set[str] = set()
        self.batches: list[Batch] = []

    def execute(self, batch: Batch) -> list[Sample]:
        self.batches.append(batch)
        samples = []
        for chunk in batch.chunks:
            places = [
                block * self.block_size + offset for block in chunk.sequence.blocks for offset in range(self.block_size)
            ]
            token_ids = [*chunk.sequence.token_ids[chunk.start : chunk.end], *chunk.drafts]
            for position, token_id in enumerate(token_ids, chunk.start):
                self.cache[places[position]] = token_id
            for end in range(chunk.end, chunk.end + chunk.num_draws):
                if chunk.sequence.sequence_id in self.broken:
                    samples.append(Sample(None))
                else:
                    samples.append(Sample(self.next_token([self.cache[place] for place in places[:end]])))
        return samples


def make_engine(
    num_blocks: int = 64, *, is_position_exact: bool = True, next_token: NextToken = next_token, **config
) -> tuple[Engine, TokenCacheExecutor]:
    executor = TokenCacheExecutor(num_blocks, is_position_exact=is_position_exact, next_token=next_token)
    settings = {"eos_token_id": EOS, "max_positions": 128, "max_sequences": 8, "step_tokens": 16} | config
    return Engine(executor, EngineConfig(**settings), clock=lambda: 0.0), executor


def expected_tokens(prompt: Sequence[int], params: GenerationParams, next_token: NextToken = next_token) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < params.max_new_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not params.ignore_eos:
            break
    return tokens[len(prompt) :]


def run_to_end(engine: Engine) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.sequence_id, []).append(output)
    return outputs
