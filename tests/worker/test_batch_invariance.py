"""On the CPU a sequence's logits do not depend, to the last bit, on what else runs or on how it came to run."""

import itertools
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from oasst_worker.engine import Batch, Chunk, Engine, EngineConfig, GenerationParams, Sample, Sequence
from oasst_worker.model.attention import FP8, INT8, CompiledAttention, PlainAttention, build_attention
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.linear import PackedLinear, PlainQuantizedLinear, build_linear, build_quantized_linear
from oasst_worker.model.neox import NeoX
from oasst_worker.model.weights import LayerPlace, LayerRun, LayerWeights, NeoXWeights
from oasst_worker.runtime.runner import ModelRunner
from oasst_worker.runtime.tensors import make_inputs, make_rows
from prompt_logits import prompt_logits

NUM_SEQUENCES = 32
SHAPES = {
    "heads of 64": {"hidden_size": 256, "num_heads": 4, "num_layers": 2, "vocab_size": 1000},
    "heads of 40, odd vocabulary": {"hidden_size": 80, "num_heads": 2, "num_layers": 3, "vocab_size": 301},
    "heads of 128, sequential": {
        "hidden_size": 256,
        "num_heads": 2,
        "num_layers": 2,
        "vocab_size": 500,
        "parallel_residual": False,
    },
}


def compiled_attention(config, *, dtype, device, kv_dtype=None):
    return CompiledAttention(config, dtype=dtype, kv_dtype=kv_dtype)


def make_model(dtype: torch.dtype, make_attention=build_attention, make_linear=build_linear, **shape) -> NeoX:
    fields = {"parallel_residual": True} | shape
    hidden, vocab = fields["hidden_size"], fields["vocab_size"]
    config = NeoXConfig(
        head_dim=hidden // fields["num_heads"],
        intermediate_size=4 * hidden,
        rotary_dim=hidden // fields["num_heads"] // 4 // 2 * 2,
        rotary_base=10000.0,
        max_positions=512,
        layer_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_bias=True,
        hidden_act="gelu",
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=1,
        dtype=dtype,
        **fields,
    )
    generator = torch.Generator().manual_seed(0)

    def random_tensor(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * 0.1).to(dtype)

    def norm() -> torch.Tensor:
        return torch.ones(hidden, dtype=dtype)

    layers = tuple(
        LayerWeights(
            norm1_weight=norm(),
            norm1_bias=random_tensor(hidden),
            norm2_weight=norm(),
            norm2_bias=random_tensor(hidden),
            qkv_weight=random_tensor(3 * hidden, hidden),
            qkv_bias=random_tensor(3 * hidden),
            dense_weight=random_tensor(hidden, hidden),
            dense_bias=random_tensor(hidden),
            mlp_in_weight=random_tensor(4 * hidden, hidden),
            mlp_in_bias=random_tensor(4 * hidden),
            mlp_out_weight=random_tensor(hidden, 4 * hidden),
            mlp_out_bias=random_tensor(hidden),
        )
        for _ in range(config.num_layers)
    )
    return NeoX(
        config,
        NeoXWeights(
            embed_in=random_tensor(vocab, hidden),
            runs=(LayerRun(LayerPlace(config.num_layers, torch.device("cpu")), layers),),
            final_norm_weight=norm(),
            final_norm_bias=random_tensor(hidden),
            head=random_tensor(vocab, hidden),
        ),
        make_linear,
        make_attention,
    )


class RecordingRunner(ModelRunner):
    """Keeps the logits each sequence drew from."""

    def __init__(self, model: NeoX, num_blocks: int) -> None:
        super().__init__(model, num_blocks=num_blocks)
        self.logits: dict[str, list[torch.Tensor]] = {}

    def execute(self, batch: Batch) -> list[Sample]:
        logits = self._forward(batch)
        for row, chunk in zip(logits, [chunk for chunk in batch.chunks if chunk.draws], strict=True):
            self.logits.setdefault(chunk.sequence.sequence_id, []).append(row.clone())
        return [Sample(token_id) for token_id in logits.argmax(dim=1).tolist()]


def make_jobs(vocab_size: int) -> dict[str, tuple[list[int], int]]:
    """Sequence id -> (prompt, tokens to generate), around and across the prefill tile."""
    rng = random.Random(0)
    lengths = [1, 2, 15, 63, 64, 65, 100, 128, 129, 180]
    return {
        str(number): ([rng.randrange(1, vocab_size) for _ in range(rng.choice(lengths))], rng.randint(6, 20))
        for number in range(NUM_SEQUENCES)
    }


def run(model, jobs, *, arrivals=None, resumed=None, num_blocks=1024, step_tokens=512):
    """Logits of each sequence, and the engine that ran them."""
    runner = RecordingRunner(model, num_blocks)
    config = EngineConfig(eos_token_id=0, max_positions=512, max_sequences=NUM_SEQUENCES, step_tokens=step_tokens)
    engine = Engine(runner, config, clock=itertools.count().__next__)  # Every step takes as long: schedules repeat.
    waiting = sorted(jobs, key=lambda name: (arrivals or {}).get(name, 0))
    step = 0
    while waiting or engine.has_work():
        while waiting and (arrivals or {}).get(waiting[0], 0) <= step:
            name = waiting.pop(0)
            prompt, max_new_tokens = jobs[name]
            params = GenerationParams(max_new_tokens=max_new_tokens, ignore_eos=True)
            engine.add(Sequence(name, prompt, params, output_ids=(resumed or {}).get(name, ())))
        engine.step()
        step += 1
    return runner.logits, engine


SCENES = [*((shape, compiled_attention) for shape in SHAPES), ("heads of 40, odd vocabulary", PlainAttention)]


@pytest.fixture(params=SCENES, ids=lambda scene: f"{scene[0]}, {scene[1].__name__}", scope="module")
def scene(request):
    """(model, jobs, logits of every sequence run alone)."""
    shape, make_attention = request.param
    model = make_model(torch.float32, make_attention, **SHAPES[shape])
    jobs = make_jobs(model.config.vocab_size)
    alone = {}
    for name, job in jobs.items():
        alone |= run(model, {name: job})[0]
    return model, jobs, alone


def assert_same_bits(logits, expected):
    for name, rows in expected.items():
        assert len(logits[name]) == len(rows)
        for position, (row, other) in enumerate(zip(logits[name], rows, strict=True)):
            assert torch.equal(row, other), f"sequence {name}, token {position}"


def random_arrivals(jobs):
    rng = random.Random(1)
    return {name: rng.randint(0, 25) for name in jobs}


def test_among_31_others_admitted_at_random_steps(scene):
    model, jobs, alone = scene
    logits, _ = run(model, jobs, arrivals=random_arrivals(jobs))
    assert_same_bits(logits, alone)


def test_with_prompts_in_chunks(scene):
    model, jobs, alone = scene
    logits, _ = run(model, jobs, arrivals=random_arrivals(jobs), step_tokens=NUM_SEQUENCES + 64)
    assert_same_bits(logits, alone)


def long_answers(jobs):
    """A few of the jobs, with answers that outgrow the block each sequence finds free when it starts."""
    return {name: (jobs[name][0], 50) for name in sorted(jobs)[:8]}


def test_after_preemption_in_scattered_blocks(scene):
    model, jobs, _ = scene
    assert_same_bits_after_preemption(model, long_answers(jobs))


def assert_same_bits_after_preemption(model, jobs):
    alone = {}
    for name, job in jobs.items():
        alone |= run(model, {name: job})[0]
    logits, engine = run(model, jobs, num_blocks=20)
    assert engine.num_preemptions > 0
    assert_same_bits(logits, alone)


def test_resumed_in_the_middle(scene):
    model, jobs, alone = scene
    resumed = {
        name: [int(row.argmax()) for row in rows[: 1 + int(name) % (len(rows) - 1)]] for name, rows in alone.items()
    }
    logits, _ = run(model, jobs, resumed=resumed)
    assert_same_bits(logits, {name: rows[len(resumed[name]) :] for name, rows in alone.items()})


def test_with_beginnings_that_were_computed_for_others(scene):
    model, jobs, alone = scene
    turns = {}
    for name, (prompt, max_new_tokens) in jobs.items():
        answer = [int(row.argmax()) for row in alone[name]]
        turns[f"{name}, next turn"] = ([*prompt, *answer, 1, 2, 3], max_new_tokens)
    expected = {}
    for name, turn in turns.items():
        expected |= run(model, {name: turn})[0]
    arrivals = dict.fromkeys(jobs, 0) | dict.fromkeys(turns, 40)
    logits, engine = run(model, jobs | turns, arrivals=arrivals)
    assert engine.num_cached_tokens > 0
    assert_same_bits(logits, expected | alone)


where_bf16_is_packed = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no product of bf16 for this processor"
)


@pytest.mark.parametrize(
    ("dtype", "make_attention", "make_linear"),
    [
        (torch.bfloat16, compiled_attention, build_linear),
        pytest.param(torch.bfloat16, PlainAttention, PackedLinear, marks=where_bf16_is_packed),
        (torch.bfloat16, compiled_attention, build_quantized_linear),
        (torch.float32, compiled_attention, build_quantized_linear),
        (torch.float32, PlainAttention, PlainQuantizedLinear),
        (torch.float32, partial(PlainAttention, kv_dtype=FP8), build_linear),
        pytest.param(torch.bfloat16, partial(PlainAttention, kv_dtype=FP8), PackedLinear, marks=where_bf16_is_packed),
        (torch.float32, partial(compiled_attention, kv_dtype=INT8), build_linear),
        (torch.bfloat16, partial(compiled_attention, kv_dtype=INT8), build_quantized_linear),
        (torch.float32, partial(PlainAttention, kv_dtype=INT8), build_linear),
    ],
)
def test_in_bf16_and_int8_and_with_narrow_keys_and_values_too(dtype, make_attention, make_linear):
    model = make_model(dtype, make_attention, make_linear, **SHAPES["heads of 40, odd vocabulary"])
    assert_same_bits_after_preemption(model, long_answers(make_jobs(model.config.vocab_size)))


def test_a_generated_token_has_the_bits_it_would_have_in_a_prompt():
    """The kernel's rows depend on nothing but their own positions, so what was generated may be read like a prompt."""
    model = make_model(torch.float32, compiled_attention, **SHAPES["heads of 64"])
    jobs = {"0": (list(range(1, 150)), 20)}
    generated = run(model, jobs)[0]["0"]
    tokens = jobs["0"][0] + [int(row.argmax()) for row in generated[:-1]]
    as_prompt = prompt_logits(ModelRunner(model, num_blocks=16), tokens)
    assert torch.equal(as_prompt[-len(generated) :], torch.stack(generated))


class CrampedRunner(ModelRunner):
    """Its device has no memory for every fifth batch of more than two sequences."""

    num_batches = 0

    def _forward(self, batch: Batch, *options) -> torch.Tensor:
        self.num_batches += 1
        logits = super()._forward(batch, *options)
        if self.num_batches % 5 == 0 and len(batch.chunks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_device_without_memory_for_some_batches_gives_the_same_tokens(looks_ahead):
    model = make_model(torch.float32, compiled_attention, **SHAPES["heads of 64"])
    jobs = make_jobs(model.config.vocab_size)

    def tokens(runner: ModelRunner) -> tuple[dict[str, list[int | None]], Engine]:
        engine = Engine(runner, EngineConfig(eos_token_id=0, max_positions=512, max_sequences=NUM_SEQUENCES))
        for name, (prompt, max_new_tokens) in jobs.items():
            params = GenerationParams(max_new_tokens=max_new_tokens, seed=int(name), ignore_eos=True)
            engine.add(Sequence(name, prompt, params))
        drawn: dict[str, list[int | None]] = {name: [] for name in jobs}
        while engine.has_work():
            for output in engine.step():
                drawn[output.sequence_id].append(output.token_id)
        return drawn, engine

    cramped, engine = tokens(CrampedRunner(model, num_blocks=1024, looks_ahead=looks_ahead))
    assert engine.num_out_of_memory > 2
    assert cramped == tokens(ModelRunner(model, num_blocks=1024))[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "make_linear", "tolerance"),
    [
        (torch.float32, None, build_linear, 1e-4),
        (torch.bfloat16, None, build_linear, 0.1),
        (torch.float32, None, build_quantized_linear, 1e-2),
        (torch.float32, INT8, build_linear, 1e-2),
    ],
)
def test_all_layers_in_one_call_give_what_they_give_one_by_one(
    dtype, kv_dtype, make_linear, tolerance, shape, monkeypatch
):
    tokens = list(range(1, 101))
    make_attention = partial(compiled_attention, kv_dtype=kv_dtype)
    at_once = make_model(dtype, make_attention, make_linear, **SHAPES[shape])
    assert at_once.has_compiled_layers
    monkeypatch.setattr("oasst_worker.model.stack.CompiledLayers", refuse)
    one_by_one = make_model(dtype, make_attention, make_linear, **SHAPES[shape])
    assert not one_by_one.has_compiled_layers
    logits, expected = (prompt_logits(ModelRunner(model, num_blocks=16), tokens) for model in (at_once, one_by_one))
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * expected.std().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make_linear", [build_linear, build_quantized_linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_the_same_bits_whether_the_model_is_one_call_or_layers_and_head_are_two(dtype, make_linear, shape):
    model = make_model(dtype, make_linear=make_linear, **SHAPES[shape])
    sequence = Sequence("a", list(range(1, 40)), GenerationParams(1))
    sequence.blocks = [3, 0, 2]
    rows = make_rows(Batch((Chunk(sequence, 0, 39),)))
    inputs = replace(rows, drawing_rows=range(39)).to(model.device)
    at_once, in_two = (model.make_cache(4) for _ in range(2))
    expected = model.logits(model.hidden(inputs, in_two))
    assert torch.equal(model.forward(inputs, at_once), expected)
    assert torch.equal(at_once[0], in_two[0])
    assert torch.equal(expected.to(dtype).float(), expected)  # Rounded like the model's other numbers.


def test_an_id_that_is_none_is_refused_before_anything_is_read():
    model = make_model(torch.float32, **next(iter(SHAPES.values())))
    sequence = Sequence("a", [1, model.config.vocab_size, 2], GenerationParams(1))
    sequence.blocks = [0]
    inputs = make_inputs(Batch((Chunk(sequence, 0, 3),)), device=model.device)
    with pytest.raises(IndexError, match=str(model.config.vocab_size)):
        model.forward(inputs, model.make_cache(1))


def refuse(*_):
    raise RuntimeError("not here")
