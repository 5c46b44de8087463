"""`python -m bench.gpu`: the engine on one GPU, random weights of the 12 B model's shape made on the card.

Every figure stands beside what the same card was seen to do in the same run: steps beside the floor that its rate of
reading and its rate of products set for the very lengths, tokens per second beside transformers with the same weights.
`--device cpu --shape tiny` runs every line of it where there is no GPU; its figures mean nothing.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from oasst_cli.plan.roofline import Card, Link, Machine, ModelShape, StepWork
from oasst_worker.engine import Engine, EngineConfig, GenerationParams, OutOfDeviceMemoryError, Sequence
from oasst_worker.model.attention import FP8, build_attention
from oasst_worker.model.config import NeoXConfig, load_config
from oasst_worker.model.inputs import BLOCK_SIZE
from oasst_worker.model.linear import Linear, build_linear, build_row_exact_linear
from oasst_worker.model.neox import NeoX
from oasst_worker.model.weights import LayerPlace, LayerRun, LayerWeights, NeoXWeights, deinterleave_qkv
from oasst_worker.runtime import ModelRunner
from rich.console import Console
from rich.table import Table
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer

from bench.checkpoints import VOCAB_SIZE, random_prompts
from bench.engine import OURS, EngineRow, compare_systems, engine_table
from bench.greedy import UNPACED, decode_steps, generate_greedily, num_decoded, step_with_all
from bench.peers.answering import Generate
from bench.peers.programs.transformers_continuous import continuous_batching
from bench.peers.programs.transformers_static import static_batch
from bench.profile import fastest
from bench.simulation import work_of

STEP_TOKENS = 8192

# PyTorch's, the engine's, and that of transformers' continuous batching.
_OUT_OF_MEMORY = (torch.OutOfMemoryError, OutOfDeviceMemoryError, MemoryError)


@dataclass(frozen=True)
class Shape:
    """A model, and how long and how many the sequences are that it is measured with."""

    num_layers: int
    hidden_size: int
    num_heads: int
    max_positions: int
    vocab_size: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    prompt_tokens: int  # Of the prefill.
    peer_tokens: tuple[int, int]  # In and out, beside transformers.
    mixed_batch: int
    matrix_size: int  # Of the product that measures the card.
    read_bytes: int

    def config(self) -> GPTNeoXConfig:
        return GPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            max_position_embeddings=self.max_positions,
            bos_token_id=0,
            eos_token_id=0,
        )


SHAPES = {
    "12b": Shape(
        36, 5120, 40, 2048, VOCAB_SIZE, (512, 1024), (1, 8, 32, 64, 128), 32, 2047, (256, 128), 32, 8192, 2**33
    ),
    "tiny": Shape(2, 64, 2, 128, 1000, (32, 48), (1, 4), 3, 96, (32, 8), 4, 256, 2**20),
}


@dataclass(frozen=True)
class StepRow:
    """A kind of step: milliseconds, and what the card allows for its lengths."""

    way: str  # How the model is computed.
    kind: str
    sequences: int
    context: int
    step_ms: float
    floor_ms: float

    @property
    def share_of_floor(self) -> float:
        return self.floor_ms / self.step_ms


@dataclass(frozen=True)
class LookaheadRow:
    """A decode step, launched before the last one was waited for, and after."""

    sequences: int
    context: int
    ahead_ms: float
    after_ms: float


@dataclass(frozen=True)
class MixedRow:
    """Requests of mixed lengths, as many running as fit, beside as many that decode and do nothing else."""

    sequences: int
    tokens_per_s: float
    steady_tokens_per_s: float  # At the mixed load's mean context.
    kv_waste: float  # Share of the positions held in blocks that hold no token.


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cuda by default")
    parser.add_argument("--shape", choices=SHAPES, default="12b", help="of the model; 12b by default")
    dtypes = ["float16", "bfloat16", "float32"]
    parser.add_argument("--dtype", choices=dtypes, default="float16", help="of weights; float16 by default")
    parser.add_argument("--rounds", type=int, metavar="N", default=3, help="beside transformers; 3 by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes the figures to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench.gpu: PyTorch finds no CUDA device here; it needs one GPU and PyTorch's CUDA build", file=sys.stderr
        )
        return 2
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=120)
    shape, device = SHAPES[arguments.shape], torch.device(arguments.device)
    for figures in measure(shape, device, arguments.dtype, arguments.rounds, console):
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(
    shape: Shape, device: torch.device, dtype_name: str, rounds: int, console: Console
) -> Iterator[dict[str, Any]]:
    """Part after part, printed as it comes; what was printed so far, as JSON has it."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    card = measure_card(shape, device, dtype)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, transformers {transformers.__version__}"
    about = (
        f"{card.name}, {versions}, Python {platform.python_version()}, {dtype_name}:"
        f" reads {card.read_bytes_per_s / 1e9:.0f} GB/s, multiplies {card.flop_per_s / 1e12:.2f} TFLOP/s"
    )
    console.print(about)
    model_shape = ModelShape(
        shape.num_layers,
        shape.hidden_size,
        shape.vocab_size,
        shape.max_positions,
        shape.num_heads,
        bytes_per_value=dtype.itemsize,
    )
    reference = random_model(shape, device, dtype)
    console.print(f"transformers attends by {reference.config._attn_implementation}")
    config, weights = share_weights(reference)
    ways: dict[str, tuple[Callable[..., Linear], torch.dtype]] = {
        "plain": (build_linear, dtype),
        "row-exact": (build_row_exact_linear, dtype),
        "fp8 cache": (build_linear, FP8),
    }
    figures: dict[str, Any] = {"about": about}
    steps: list[StepRow] = []
    for way, (make_linear, kv_dtype) in ways.items():
        model = NeoX(config, weights, make_linear, partial(build_attention, kv_dtype=kv_dtype))
        console.print(f"{way}: rows {'do not' if model.is_row_exact else 'do'} change each other's bits")
        of_way = dataclasses.replace(model_shape, kv_bytes_per_value=kv_dtype.itemsize)
        steps += measure_steps(model, way, Machine(card, model=of_way, efficiency=1.0), shape)

    def keep(part: str, rows: list[Any], table: Callable[[list[Any]], Table]) -> dict[str, Any]:
        if rows:
            console.print(table(rows))
        figures[part] = [dataclasses.asdict(row) for row in rows]
        return figures

    yield keep("steps", steps, steps_table)
    model = NeoX(config, weights)
    yield keep("lookahead", list(measure_lookahead(model, shape)), lookahead_table)
    mixed = _if_it_fits("a load of mixed lengths", measure_mixed, model, shape)
    yield keep("mixed", [mixed] if mixed else [], mixed_table)
    yield keep("peers", measure_peers(model, reference, shape, rounds), partial(engine_table, dtype=dtype_name))


def measure_card(shape: Shape, device: torch.device, dtype: torch.dtype) -> Card:
    """What it reads and multiplies at best."""
    block = torch.zeros(shape.read_bytes // 4, device=device)
    read_s = _fastest(block.sum, device)
    square = torch.randn(shape.matrix_size, shape.matrix_size, device=device, dtype=dtype)
    product_s = _fastest(lambda: square @ square, device)
    is_gpu = device.type == "cuda"
    return Card(
        torch.cuda.get_device_name(device) if is_gpu else f"{platform.machine()} processor, no GPU",
        memory_bytes=torch.cuda.mem_get_info(device)[1] if is_gpu else 0,
        read_bytes_per_s=block.nbytes / read_s,
        flop_per_s=2 * shape.matrix_size**3 / product_s,
        link=Link(0, 0),
        is_measured=True,
    )


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> GPTNeoXForCausalLM:
    """transformers' model, made on the device."""
    torch.manual_seed(0)
    with device:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return GPTNeoXForCausalLM(shape.config()).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(default)


def share_weights(reference: GPTNeoXForCausalLM) -> tuple[NeoXConfig, NeoXWeights]:
    """Ours of the reference's weights, without a copy of any but the query-key-value rows."""
    with tempfile.TemporaryDirectory(prefix="oasst-bench-") as folder:
        reference.config.save_pretrained(folder)
        config = load_config(Path(folder))
    model = reference.gpt_neox
    layers = tuple(_share_layer(layer, config.num_heads) for layer in model.layers)
    weights = NeoXWeights(
        embed_in=model.embed_in.weight,
        runs=(LayerRun(LayerPlace(config.num_layers, reference.device), layers),),
        final_norm_weight=model.final_layer_norm.weight,
        final_norm_bias=model.final_layer_norm.bias,
        head=reference.get_output_embeddings().weight,
    )
    return config, weights


def _share_layer(layer: GPTNeoXLayer, num_heads: int) -> LayerWeights:
    return LayerWeights(
        norm1_weight=layer.input_layernorm.weight,
        norm1_bias=layer.input_layernorm.bias,
        norm2_weight=layer.post_attention_layernorm.weight,
        norm2_bias=layer.post_attention_layernorm.bias,
        qkv_weight=deinterleave_qkv(layer.attention.query_key_value.weight, num_heads),
        qkv_bias=deinterleave_qkv(layer.attention.query_key_value.bias, num_heads),
        dense_weight=layer.attention.dense.weight,
        dense_bias=layer.attention.dense.bias,
        mlp_in_weight=layer.mlp.dense_h_to_4h.weight,
        mlp_in_bias=layer.mlp.dense_h_to_4h.bias,
        mlp_out_weight=layer.mlp.dense_4h_to_h.weight,
        mlp_out_bias=layer.mlp.dense_4h_to_h.bias,
    )


def measure_steps(model: NeoX, way: str, machine: Machine, shape: Shape) -> Iterator[StepRow]:
    """Decode at each context and batch that the memory holds, and one prompt."""
    for context in shape.contexts:
        for batch in shape.batches:
            what = f"decode of {batch} sequences of {context} tokens"
            measured = _if_it_fits(what, _decode_steps, model, batch, context, shape.steps)
            if measured is not None:
                step_s = statistics.median(seconds for seconds, _ in measured)
                floor_s = statistics.median(machine.step_s(work) for _, work in measured)
                yield StepRow(way, "decode", batch, context, step_s * 1e3, floor_s * 1e3)
    prompt_s = min(_prefill_s(model, shape.prompt_tokens) for _ in range(3))
    length = shape.prompt_tokens
    floor_s = machine.step_s(StepWork(length, 1, 0, length * (length + 1) / 2))
    yield StepRow(way, "prefill", 1, length, prompt_s * 1e3, floor_s * 1e3)


def measure_lookahead(model: NeoX, shape: Shape) -> Iterator[LookaheadRow]:
    """At the shortest context, where Python's share of a step is largest; both ways in turn, medians of all steps."""
    context = shape.contexts[0]
    for batch in shape.batches:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for looks_ahead in (True, False, False, True):
            what = f"decode of {batch} sequences of {context} tokens"
            measured = _if_it_fits(what, _decode_steps, model, batch, context, shape.steps, looks_ahead)
            seconds[looks_ahead] += [step_s for step_s, _ in measured or ()]
        if all(seconds.values()):
            ahead_s, after_s = (statistics.median(seconds[looks_ahead]) for looks_ahead in (True, False))
            yield LookaheadRow(batch, context, ahead_s * 1e3, after_s * 1e3)


def measure_mixed(model: NeoX, shape: Shape) -> MixedRow:
    """From when all places are taken until no request waits any more."""
    lengths = torch.randint(shape.max_positions // 16, shape.max_positions // 2, (4 * shape.mixed_batch, 2))
    runner = _runner(model, shape.mixed_batch * shape.max_positions // BLOCK_SIZE, shape.mixed_batch)
    engine = Engine(runner, _engine_config(model, shape.mixed_batch))
    for number, (prompt_tokens, new_tokens) in enumerate(lengths.tolist()):
        [prompt] = random_prompts(1, prompt_tokens, shape.vocab_size, seed=number)
        engine.add(Sequence(str(number), prompt, _params(new_tokens)))
    while engine.num_running < shape.mixed_batch:
        step_with_all(engine)
    num_tokens = num_steps = used = held = 0
    start = time.perf_counter()
    while engine.num_waiting:
        num_tokens += len(step_with_all(engine))
        num_steps += 1
        used += sum(chunk.end for chunk in engine.last_batch.chunks)
        held += sum(len(chunk.sequence.blocks) * BLOCK_SIZE for chunk in engine.last_batch.chunks)
    seconds = time.perf_counter() - start
    mean_context = used // (num_steps * shape.mixed_batch)
    del runner, engine  # Their cache makes room for the next.
    steady_s = statistics.median(
        step_s for step_s, _ in _decode_steps(model, shape.mixed_batch, mean_context, shape.steps)
    )
    return MixedRow(shape.mixed_batch, num_tokens / seconds, shape.mixed_batch / steady_s, 1 - used / held)


def measure_peers(model: NeoX, reference: GPTNeoXForCausalLM, shape: Shape, rounds: int) -> list[EngineRow]:
    """Generation from prompt to last token, at each batch, by the systems that have memory for it."""
    prompt_tokens, new_tokens = shape.peer_tokens
    rows = []
    for batch in shape.batches:
        prompts = random_prompts(batch, prompt_tokens, shape.vocab_size)
        fitting = {
            name: generate
            for name, generate in systems_on(model, reference, shape, batch).items()
            if _if_it_fits(f"{name} with {batch} sequences", generate, prompts, new_tokens) is not None
        }
        if OURS in fitting:
            rows.append(compare_systems("random", fitting, prompts, new_tokens=new_tokens, rounds=rounds))
    return rows


def systems_on(model: NeoX, reference: GPTNeoXForCausalLM, shape: Shape, batch: int) -> dict[str, Generate]:
    """Ours and transformers' ways to generate, for so many sequences at once, on the same weights."""
    max_tokens = sum(shape.peer_tokens)
    runner = _runner(model, batch * (-(-max_tokens // BLOCK_SIZE) + 1), batch)

    def ours(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return generate_greedily(runner, _engine_config(model, batch), prompts, new_tokens)[0]

    return {
        OURS: ours,
        "transformers generate": static_batch(reference),
        "transformers continuous batching": continuous_batching(
            reference, max_sequences=batch, max_tokens=max_tokens, step_tokens=STEP_TOKENS
        ),
    }


def steps_table(rows: list[StepRow]) -> Table:
    table = Table(title="A step: ms, and its share of what this card allows for the same lengths", padding=0)
    for heading in ("step", "sequences", "tokens each"):
        table.add_column(heading, justify="right")
    for way in dict.fromkeys(row.way for row in rows):
        table.add_column(f"{way}, ms", justify="right")
        table.add_column("tokens/s", justify="right")
        table.add_column("of the floor", justify="right")
    by_kind: dict[tuple[str, int, int], list[StepRow]] = {}
    for row in rows:
        by_kind.setdefault((row.kind, row.sequences, row.context), []).append(row)
    for (kind, sequences, context), of_kind in by_kind.items():
        tokens = sequences if kind == "decode" else context
        cells = [
            (f"{row.step_ms:.2f}", f"{tokens / row.step_ms * 1e3:.0f}", f"{row.share_of_floor:.0%}") for row in of_kind
        ]
        table.add_row(kind, str(sequences), str(context), *(cell for of_row in cells for cell in of_row))
    return table


def lookahead_table(rows: list[LookaheadRow]) -> Table:
    table = Table(title="A decode step launched before the last one was waited for, and after: ms")
    for heading in ("sequences", "tokens each", "before", "after", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        ratio = row.after_ms / row.ahead_ms
        table.add_row(
            str(row.sequences), str(row.context), f"{row.ahead_ms:.2f}", f"{row.after_ms:.2f}", f"{ratio:.2f}"
        )
    return table


def mixed_table(rows: list[MixedRow]) -> Table:
    table = Table(title="Requests of mixed lengths, prefill included, beside steady decode at their mean context")
    for heading in ("sequences", "tokens/s", "steady tokens/s", "of it", "KV cache wasted"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.sequences),
            f"{row.tokens_per_s:.0f}",
            f"{row.steady_tokens_per_s:.0f}",
            f"{row.tokens_per_s / row.steady_tokens_per_s:.0%}",
            f"{row.kv_waste:.1%}",
        )
    return table


def _decode_steps(
    model: NeoX, batch: int, context: int, steps: int, looks_ahead: bool | None = None
) -> list[tuple[float, StepWork]]:
    """So many steps of sequences that decode and do nothing else, each with its seconds."""
    prompts = random_prompts(batch, context, model.config.vocab_size)
    config = _engine_config(model, batch)
    blocks_each = -(-(context + num_decoded(config, prompts, steps)) // BLOCK_SIZE) + 1
    runner = _runner(model, batch * blocks_each, batch, looks_ahead)
    return [(step_s, work_of(computed)) for step_s, computed in decode_steps(runner, config, prompts, steps)]


def _prefill_s(model: NeoX, length: int) -> float:
    runner = _runner(model, -(-(length + 1) // BLOCK_SIZE) + 1, 1)
    engine = Engine(runner, _engine_config(model, 1))
    [prompt] = random_prompts(1, length, model.config.vocab_size)
    engine.add(Sequence("prompt", prompt, _params(1)))
    start = time.perf_counter()
    while engine.has_work():
        engine.step()
    return time.perf_counter() - start


def _runner(model: NeoX, num_blocks: int, max_sequences: int, looks_ahead: bool | None = None) -> ModelRunner:
    """As a worker makes it; a bucket is made when it is first needed, before anything is timed."""
    return ModelRunner(model, num_blocks=num_blocks, max_decoding=max_sequences, looks_ahead=looks_ahead)


def _engine_config(model: NeoX, max_sequences: int) -> EngineConfig:
    return EngineConfig(-1, model.config.max_positions, max_sequences, STEP_TOKENS, max_slowdown=UNPACED)


def _params(new_tokens: int) -> GenerationParams:
    return GenerationParams(new_tokens, temperature=0.0, ignore_eos=True)


def _if_it_fits(what: str, measure: Callable[..., Any], *arguments: Any) -> Any:
    """What `measure` gives, or None, said aloud, where the device has no memory for it."""
    try:
        return measure(*arguments)
    except _OUT_OF_MEMORY:
        print(f"{what} does not fit into this card's memory", file=sys.stderr)
    torch.cuda.empty_cache()  # Behind the handler, whose traceback holds what was allocated.
    return None


def _fastest(call: Callable[[], Any], device: torch.device) -> float:
    def call_to_the_end() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return fastest(call_to_the_end)


if __name__ == "__main__":
    sys.exit(main())
