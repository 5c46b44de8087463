"""Distributions equal transformers', draws follow them, and the fast paths equal the plain one."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from oasst.presets import PRESETS
from oasst_worker.engine.params import GenerationParams
from oasst_worker.model import sampler as sampler_module
from oasst_worker.model.compiled_draw import CompiledDraw
from oasst_worker.model.penalties import penalize
from oasst_worker.model.philox import philox4x32
from oasst_worker.model.sampler import Sampled, Sampler, SamplingRow, uniform_for
from oasst_worker.model.shortcuts import draw_from_bucket, is_greedy
from oasst_worker.model.warpers import draw, warp
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessorList

VOCABULARY = 2000
PROMPT = [5, 17, 17, 900, 3, 5]

EACH_ALONE = {
    "temperature": [0.1, 0.75, 2.0, 100.0],
    "top_k": [1, 50, 1999, 5000],
    "top_p": [0.01, 0.5, 0.95, 0.999],
    "min_p": [0.001, 0.1, 1.0],
    "typical_p": [0.05, 0.2, 0.9, 0.999],
    "repetition_penalty": [0.5, 1.2, 3.0],
}


def params_of(**fields) -> GenerationParams:
    return GenerationParams(max_new_tokens=1, **fields)


def preset(name) -> GenerationParams:
    return GenerationParams(**PRESETS[name])


def random_params(rng: random.Random) -> GenerationParams:
    """Every filter is off or on, independently."""
    fields = {
        name: rng.choice(values) for name, values in EACH_ALONE.items() if rng.random() < 0.5 and name != "temperature"
    }
    return params_of(temperature=rng.choice([0.01, 0.3, 0.8, 1.0, 1.5]), **fields)


def peaked(rows, vocabulary=VOCABULARY, seed=0):
    """Logits like a language model's: a Zipf-like head, a few nats of entropy."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)])
    return -1.6 * (ranks + 1.0).log() + torch.randn(rows, vocabulary, generator=generator) * 0.5


def flat(rows, vocabulary=VOCABULARY, seed=0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def with_ties(rows, vocabulary=VOCABULARY, seed=0):
    """Few distinct values, as logits from a bfloat16 product have."""
    return (peaked(rows, vocabulary, seed) * 4).round() / 4


ALL_SHAPES = [peaked, flat, with_ties]


@pytest.fixture(params=["compiled", "operators"])
def paths(request, monkeypatch):
    """Rows are drawn by the kernel, or by PyTorch's operators."""
    if request.param == "operators":
        monkeypatch.setattr(sampler_module, "CompiledDraw", refuse)


def refuse(*_):
    raise RuntimeError("not here")


by_both_paths = pytest.mark.usefixtures("paths")


@pytest.fixture
def transformers_probabilities(make_model):
    """The distribution transformers' `generate` would draw from, by the processors it would choose itself."""
    model = make_model()

    def probabilities(logits, params: GenerationParams, **more):
        config = GenerationConfig(
            do_sample=True,
            temperature=float(params.temperature),
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p or None,
            typical_p=params.typical_p,
            repetition_penalty=float(params.repetition_penalty),
            **more,
        )
        config._eos_token_tensor = torch.tensor([0])
        processors = model._get_logits_processor(config, input_ids_seq_length=len(PROMPT), device="cpu")
        assert isinstance(processors, LogitsProcessorList)
        input_ids = torch.tensor([PROMPT]).expand(len(logits), -1)
        return processors(input_ids, logits.clone()).softmax(dim=-1)

    return probabilities


def assert_same_distribution(ours, theirs, logits_of):
    if logits_of is with_ties:
        # Which of equal tokens stay at the edge of top_p hangs on an unstable sort there; how many does not.
        ours, theirs = ours.sort(dim=1).values, theirs.sort(dim=1).values
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)
    else:
        assert torch.equal(ours, theirs)


def rows_of(params, count, **fields):
    return [SamplingRow(params, uniform_for(index, 0, 0), seen_ids=PROMPT, **fields) for index in range(count)]


def processed_probabilities(logits, rows):
    """The distribution [rows, vocab] from which each row is drawn, by the plain path."""
    logits = logits.clone()
    penalize(logits, rows)
    probabilities = torch.zeros_like(logits)
    for of_row, scores, row in zip(probabilities, logits, rows, strict=True):
        if is_greedy(row.params):
            of_row[scores.argmax()] = 1.0
        else:
            of_row.copy_(warp(scores, row.params).softmax(dim=0))
    return probabilities


def bad_rows(sampled: Sampled) -> list[int]:
    """Rows that drew nothing."""
    return [row for row, token_id in enumerate(sampled.token_ids) if token_id is None]


@pytest.mark.parametrize("logits_of", ALL_SHAPES)
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EACH_ALONE.items() for value in values])
def test_each_parameter_alone_gives_transformers_distribution(transformers_probabilities, name, value, logits_of):
    logits, params = logits_of(4), params_of(**{name: value})
    ours = processed_probabilities(logits, rows_of(params, 4))
    assert_same_distribution(ours, transformers_probabilities(logits, params), logits_of)


@pytest.mark.parametrize("logits_of", ALL_SHAPES)
@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_gives_transformers_distribution(transformers_probabilities, name, logits_of):
    logits, params = logits_of(4), preset(name)
    ours = processed_probabilities(logits, rows_of(params, 4))
    assert_same_distribution(ours, transformers_probabilities(logits, params), logits_of)


@pytest.mark.parametrize("seed", range(40))
def test_random_combinations_give_transformers_distribution(transformers_probabilities, seed):
    rng = random.Random(seed)
    logits_of, params = rng.choice(ALL_SHAPES), random_params(rng)
    logits = logits_of(3, seed=seed)
    ours = processed_probabilities(logits, rows_of(params, 3, banned_ids=[0]))
    # min_new_tokens is what bans end-of-text there.
    assert_same_distribution(ours, transformers_probabilities(logits, params, min_new_tokens=1), logits_of)


def test_logit_bias_and_bans_give_transformers_distribution(transformers_probabilities):
    bias = {3: 2.5, 700: -100.0, 1500: 100.0}
    logits = peaked(2)
    ours = processed_probabilities(logits, rows_of(params_of(logit_bias=bias), 2, banned_ids=[1, 1500]))
    as_sequences = {(token_id,): value for token_id, value in bias.items()}
    theirs = transformers_probabilities(logits, params_of(), sequence_bias=as_sequences, suppress_tokens=[1, 1500])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"repetition_penalty": 2.0}, [0.5, -2.0, 1.0, 2.0]),
        ({"presence_penalty": 0.5}, [1.0, -1.5, 0.5, 2.0]),
        ({"frequency_penalty": 0.5}, [1.0, -2.5, 0.5, 2.0]),
        ({"logit_bias": {0: 3.0, 3: -1.0}}, [4.0, -1.0, 1.0, 1.0]),
        # Repetition first, then presence and frequency, then the bias: (-1 * 2) - 0.25 - 3 * 0.5 + 1.
        (
            {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5, "logit_bias": {1: 1.0}},
            [0.5, -2.75, 0.25, 2.0],
        ),
    ],
)
def test_penalties_by_hand(fields, wanted):
    # Seen: 0 and 1. Generated: 1 three times, 2 once.
    logits = torch.tensor([[1.0, -1.0, 1.0, 2.0]])
    row = SamplingRow(params_of(**fields), 0.5, seen_ids=[0, 1, 1], output_counts={1: 3, 2: 1})
    assert torch.allclose(processed_probabilities(logits, [row]), torch.tensor([wanted]).softmax(dim=1))


@by_both_paths
def test_greedy_is_the_most_likely_token_after_penalties_and_the_lowest_id_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    greedy = params_of(temperature=0.0)
    for seen_ids, wanted in ([], 1), ([1], 2), ([1, 2], 3):
        params = params_of(temperature=0.0, repetition_penalty=2.0) if seen_ids else greedy
        row = SamplingRow(params, 0.9, seen_ids=seen_ids)
        assert Sampler(4, []).sample(logits.clone(), [row]).token_ids == [wanted]
        assert processed_probabilities(logits, [row]).argmax().item() == wanted


@by_both_paths
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-20])
def test_a_temperature_close_to_zero_is_greedy(temperature):
    logits = peaked(4)
    sampled = Sampler(VOCABULARY, []).sample(logits.clone(), rows_of(params_of(temperature=temperature), 4))
    assert sampled.token_ids == logits.argmax(dim=1).tolist()


@by_both_paths
@pytest.mark.parametrize("logits_of", ALL_SHAPES)
@pytest.mark.parametrize("vocabulary", [7, 64, 65, 3000])
@pytest.mark.parametrize("seed", range(4))
def test_the_fast_paths_draw_the_plain_paths_tokens(logits_of, vocabulary, seed):
    rng = random.Random(seed)
    logits = logits_of(32, vocabulary, seed)
    params = [preset(name) for name in PRESETS] + [params_of()] + [random_params(rng) for _ in range(23)]
    banned = [vocabulary - 1, 2]
    rows = [
        SamplingRow(of_row, uniform_for(seed, 0, index), seen_ids=[rng.randrange(vocabulary) for _ in range(20)])
        for index, of_row in enumerate(params)
    ]
    sampled = Sampler(vocabulary, banned).sample(logits.clone(), rows)

    penalize(logits, rows)
    logits[:, banned] = -torch.inf
    plain = [draw(warp(scores, row.params), row.uniform) for scores, row in zip(logits, rows, strict=True)]
    assert sampled.token_ids == plain


@by_both_paths
@pytest.mark.parametrize("params", [params_of(), params_of(top_p=0.7), params_of(top_k=50), params_of(min_p=0.5)])
def test_equals_at_the_edge_of_the_prefix_are_drawn_as_by_the_plain_path(params):
    uniforms = [(number + 0.5) / 400 for number in range(400)]
    logits = torch.zeros(len(uniforms), 200)  # No prefix holds all equals.
    logits[::2, 7] = 1.0
    rows = [SamplingRow(params, uniform, seen_ids=[]) for uniform in uniforms]
    plain = [draw(warp(scores, params), row.uniform) for scores, row in zip(logits, rows, strict=True)]
    assert Sampler(200, []).sample(logits, rows).token_ids == plain


@by_both_paths
@pytest.mark.parametrize("params", [*map(preset, PRESETS), params_of(top_k=500), params_of(top_k=40, typical_p=0.3)])
def test_a_language_models_rows_are_decided_without_the_plain_path(params, monkeypatch):
    plain_rows = []
    monkeypatch.setattr(sampler_module, "_draw_row", lambda scores, row: plain_rows.append(row) or 0)
    Sampler(50288, []).sample(peaked(16, vocabulary=50288), rows_of(params, 16))
    assert len(plain_rows) <= 1


@pytest.mark.parametrize("logits_of", ALL_SHAPES)
@pytest.mark.parametrize("vocabulary", [5, 64, 1000, 50_001])
@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_decides_what_the_operators_decide(monkeypatch, vocabulary, logits_of, seed):
    rng = random.Random(seed)
    fields = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "logit_bias": {1: -3.0}}
    rows = [
        SamplingRow(
            replace(random_params(rng), **fields), uniform_for(seed, 0, index), [3, 1, 3], {3: 2, 2: 1}, banned_ids=[0]
        )
        for index in range(64)
    ]
    logits = logits_of(64, vocabulary, seed)
    by_kernel = logits.clone()
    token_ids, is_decided, is_good = CompiledDraw(vocabulary, [vocabulary - 1])(by_kernel, rows)

    monkeypatch.setattr(sampler_module, "CompiledDraw", refuse)
    monkeypatch.setattr(sampler_module, "_PREFIX_SIZES", (64,))
    told, tried = Sampler(vocabulary, [vocabulary - 1])._draw_at_once(logits, rows, None)
    assert torch.equal(by_kernel, logits)
    assert is_good.equal(told[2])
    fits = torch.tensor([size > 0 for size in tried])  # Others the operators leave to longer prefixes.
    assert (is_decided.bool() & fits).equal(told[1].bool())
    assert torch.equal(token_ids[told[1].bool()], told[0][told[1].bool()])


@by_both_paths
@pytest.mark.parametrize("params", [params_of(temperature=0.0), preset("k50"), preset("typical2")])
def test_logits_may_be_columns_of_a_wider_tensor(params):
    wide = peaked(4, VOCABULARY + 6)
    rows = rows_of(params, 4)
    expected = Sampler(VOCABULARY, []).sample(wide[:, :VOCABULARY].clone(), rows)
    assert Sampler(VOCABULARY, []).sample(wide[:, :VOCABULARY], rows) == expected


@pytest.mark.parametrize("field", [{"repetition_penalty": 1.2}, {"logit_bias": {7: 1.0}}])
def test_a_token_outside_the_vocabulary_is_refused(field):
    logits = peaked(1, 7)
    with pytest.raises(IndexError, match="7"):
        Sampler(7, []).sample(logits, [SamplingRow(params_of(**field), 0.5, seen_ids=[1, 7])])


@pytest.mark.parametrize("logits_of", ALL_SHAPES)
def test_the_bucket_holds_the_plain_draw(logits_of):
    decided = 0
    for index, scores in enumerate(logits_of(50)):
        scores[index] = -torch.inf
        uniform = uniform_for(index, 0, 0)
        token_id = draw_from_bucket(scores, uniform)
        assert token_id in (None, draw(scores, uniform))
        decided += token_id is not None
    assert decided == 50


@pytest.mark.parametrize("offset", [-1e-9, 1e-9])
def test_the_bucket_is_exact_at_the_edges_between_tokens(offset):
    scores = flat(1)[0]
    probabilities = scores.double().softmax(dim=0).sort(descending=True).values
    for edge in probabilities.cumsum(dim=0)[100:1900:100].tolist():
        assert draw_from_bucket(scores, edge + offset) == draw(scores, edge + offset)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@by_both_paths
@pytest.mark.parametrize("logits_of", ALL_SHAPES)
def test_a_row_alone_and_among_31_others_is_the_same_bit_for_bit(logits_of, two_threads):
    rng = random.Random(3)
    vocabulary = 40_000  # Wide enough for torch to split a lone row's sums over threads.
    logits = logits_of(32, vocabulary)
    sampler = Sampler(vocabulary, [1])
    rows = [
        SamplingRow(
            GenerationParams(max_new_tokens=1, **fields, logprobs=rng.choice([None, 0, 3])),
            uniform_for(index, 1, 2),
            seen_ids=PROMPT,
            output_counts={17: 2},
        )
        for index, fields in enumerate(
            [{"temperature": 0.0}, {}, {"top_k": 50}, {"top_p": 0.9}, {"typical_p": 0.2}, {"frequency_penalty": 1.0}]
            * 5
            + [{"min_p": 0.05}, {"top_k": 5, "typical_p": 0.5}]
        )
    ]
    together = sampler.sample(logits.clone(), rows)
    for index in [*range(6), 30, 31]:
        alone = sampler.sample(logits[index : index + 1].clone(), rows[index : index + 1])
        assert (alone.token_ids[0], alone.logprobs[0]) == (together.token_ids[index], together.logprobs[index])


@by_both_paths
@pytest.mark.parametrize(
    "params",
    [params_of(), params_of(temperature=0.7, top_k=8), params_of(top_p=0.8), params_of(typical_p=0.6), preset("k50")],
)
def test_draws_follow_the_distribution(params):
    count = 5_000
    logits = torch.linspace(-2, 2, 20)[torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    rows = [SamplingRow(params, uniform_for(99, 0, position), seen_ids=[4]) for position in range(count)]
    drawn = Counter(Sampler(20, []).sample(logits.repeat(count, 1), rows).token_ids)
    wanted = processed_probabilities(logits[None], rows[:1])[0] * count
    kept = wanted.nonzero().flatten().tolist()
    assert set(drawn) <= set(kept)
    chi_square = sum((drawn[token_id] - wanted[token_id].item()) ** 2 / wanted[token_id].item() for token_id in kept)
    degrees = len(kept) - 1
    # Mean and four standard deviations of the chi-square distribution.
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_a_small_random_number_draws_the_most_likely_token_and_a_large_one_the_least():
    logits = flat(1, 300)
    order = logits[0].argsort(descending=True)
    for params, least in (params_of(), order[-1]), (params_of(top_k=50), order[49]):
        for uniform, wanted in (0.0, order[0]), (1 - 2**-53, least):
            sampled = Sampler(300, []).sample(logits.clone(), [SamplingRow(params, uniform)])
            assert sampled.token_ids == [wanted.item()]


@by_both_paths
def test_banned_tokens_are_never_drawn():
    logits = torch.zeros(500, 6)
    logits[:, 4] = 50.0
    rows = [SamplingRow(params_of(), index / 500, banned_ids=[0]) for index in range(500)]
    assert set(Sampler(6, [4, 5]).sample(logits, rows).token_ids) == {1, 2, 3}


@by_both_paths
def test_a_row_with_nothing_left_to_draw_draws_nothing():
    rows = [
        SamplingRow(params, 0.5, banned_ids=banned_ids)
        for params in (params_of(), params_of(temperature=0.0), params_of(top_k=2), params_of(typical_p=0.5))
        for banned_ids in ([0], [0, 1])
    ]
    assert Sampler(3, [2]).sample(torch.zeros(8, 3), rows).token_ids == [1, None] * 4


@by_both_paths
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [params_of(logprobs=2), params_of(temperature=0.0, logprobs=2), preset("typical2")])
def test_a_row_that_is_not_finite_fails_alone(poison, params):
    logits = peaked(5)
    sampler = Sampler(VOCABULARY, [])
    healthy = sampler.sample(logits.clone(), rows_of(params, 5))
    logits[2, 1234] = poison
    sampled = sampler.sample(logits, rows_of(params, 5))
    assert bad_rows(sampled) == [2]
    for results, healthy_results in (sampled.token_ids, healthy.token_ids), (sampled.logprobs, healthy.logprobs):
        assert results[2] is None
        assert results[:2] + results[3:] == healthy_results[:2] + healthy_results[3:]


@by_both_paths
@pytest.mark.parametrize("params", [params_of(), params_of(top_k=2), params_of(temperature=1e-29, typical_p=0.5)])
def test_numbers_too_large_for_fp32_fail_their_row_only(params):
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3e38], [1.0, 2.0, 3.0]])
    rows = [SamplingRow(params, 0.5)] * 2 + [SamplingRow(params_of(repetition_penalty=1e-45), 0.5, seen_ids=[1])]
    assert bad_rows(Sampler(3, []).sample(logits, rows)) == [1, 2]


@by_both_paths
def test_large_finite_logits_are_no_failure_of_a_greedy_row():
    logits = torch.full((1, 4), 3e38)
    logits[0, 2] = 3.2e38
    assert Sampler(4, []).sample(logits, [SamplingRow(params_of(temperature=0.0), 0.5)]).token_ids == [2]


def test_logprobs_are_the_raw_logits_whatever_the_processors_do():
    logits = peaked(3)
    raw = logits.log_softmax(dim=1)
    params = params_of(temperature=0.3, top_k=5, repetition_penalty=1.5, logit_bias={7: 5.0}, logprobs=4)
    rows = [*rows_of(params, 2), SamplingRow(params_of(), 0.5)]
    sampled = Sampler(VOCABULARY, [1]).sample(logits, rows)
    for index in range(2):
        best = raw[index].topk(4)
        assert sampled.logprobs[index].logprob == raw[index, sampled.token_ids[index]].item()
        assert sampled.logprobs[index].alternatives == tuple(
            zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
    assert sampled.logprobs[2] is None


class Operators(TorchDispatchMode):
    """Those that are called meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **kwargs or {})


def test_logprobs_of_a_decided_draw_are_launched_with_it():
    numbers = (2, None, 0, 2)
    rows = [SamplingRow(params_of(temperature=0.0, logprobs=number), 0.0) for number in numbers]
    drawing = Sampler(VOCABULARY, []).launch(peaked(4), rows)
    with Operators() as operators:  # On a GPU each would wait for what was launched since.
        sampled = drawing.wait()
    assert [logprob and len(logprob.alternatives) for logprob in sampled.logprobs] == [2, None, 0, 2]
    assert not {"aten.topk.default", "aten.select.int", "aten._local_scalar_dense.default"} & set(operators.names)


def test_zero_alternatives_leave_the_tokens_own_logprob():
    sampled = Sampler(VOCABULARY, []).sample(peaked(1), rows_of(params_of(logprobs=0), 1))
    assert sampled.logprobs[0].alternatives == ()
    assert sampled.logprobs[0].logprob < 0


def test_a_batch_that_does_not_fit_its_logits_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 7\] for 1 rows of 7"):
        Sampler(7, []).sample(torch.zeros(2, 7), [SamplingRow(params_of(), 0.5)])


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        # The known answers published with the reference implementation (Random123, kat_vectors).
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, wanted):
    assert philox4x32(counter, key) == wanted


def test_the_random_number_depends_on_seed_choice_and_position():
    numbers = {
        uniform_for(seed, choice, position)
        for seed in (0, 1, 2**32, 2**64 - 1)
        for choice in (0, 1)
        for position in (0, 1, 2**32)
    }
    assert len(numbers) == 4 * 2 * 3
    assert all(0 <= number < 1 for number in numbers)
    assert uniform_for(7, 1, 5) == uniform_for(7, 1, 5)


def test_random_numbers_are_uniform():
    numbers = [uniform_for(1, 0, position) for position in range(10_000)]
    counts = Counter(int(number * 100) for number in numbers)
    chi_square = sum((counts[bin_] - 100) ** 2 / 100 for bin_ in range(100))
    assert chi_square < 99 + 4 * math.sqrt(2 * 99)
