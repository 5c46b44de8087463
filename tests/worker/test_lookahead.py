"""The next step launched before this one is waited for: the same tokens, and nothing lost or kept by it."""

import random

import pytest
import torch
from oasst.presets import PRESETS
from oasst_worker.engine import (
    Batch,
    Chunk,
    Computed,
    Engine,
    EngineConfig,
    GenerationParams,
    OutOfDeviceMemoryError,
    ScoringSequence,
    Sequence,
    TokenOutput,
)
from oasst_worker.model.config import load_config
from oasst_worker.model.neox import NeoX
from oasst_worker.model.transfer import Fetch
from oasst_worker.model.weights import load_weights
from oasst_worker.runtime import ModelRunner
from oasst_worker.runtime.launched import DrawnBatch

EOS = 7  # Drawn now and then.
NUM_SEQUENCES = 24


class WatchedRunner(ModelRunner):
    """Tells in which order batches were launched and waited for, and how many rows were computed in vain."""

    def __init__(self, model: NeoX, *, num_blocks: int = 64, looks_ahead: bool = True) -> None:
        super().__init__(model, num_blocks=num_blocks, looks_ahead=looks_ahead)
        self.events: list[str] = []
        self.num_refuted = 0

    def launch(self, batch):
        self.events.append("launch")
        return self._watch(super().launch(batch))

    def launch_behind(self, batch, before):
        self.events.append("launch behind")
        return self._watch(super().launch_behind(batch, before))

    def _watch(self, launched):
        if not isinstance(launched, DrawnBatch):
            return launched
        wait = launched.wait

        def watched():
            self.events.append("wait")
            results = wait()
            self.num_refuted += results.count(None)
            return results

        launched.wait = watched
        return launched


@pytest.fixture
def model(make_checkpoint) -> NeoX:
    folder = make_checkpoint()
    config = load_config(folder)
    return NeoX(config, load_weights(folder, config, dtype=torch.float32))


def make_engine(runner: ModelRunner, **options) -> Engine:
    fields = {"max_positions": 64, "max_sequences": 8, "step_tokens": 256} | options
    return Engine(runner, EngineConfig(eos_token_id=EOS, **fields), clock=lambda: 0.0)


def random_params(rng: random.Random) -> GenerationParams:
    """Presets, greedy, and plain draws, which a prefix of the vocabulary often does not decide."""
    fields = rng.choice([{}, {}, {"temperature": 0.0}, {"temperature": 3.0}, {"logprobs": 2}, *PRESETS.values()])
    fields = {name: value for name, value in fields.items() if name != "max_new_tokens"}
    if rng.random() < 0.2:
        fields["min_new_tokens"] = 5
    stop = frozenset({rng.randrange(96)}) if rng.random() < 0.3 else frozenset()
    return GenerationParams(rng.randint(1, 30), seed=rng.randrange(2**63), stop_token_ids=stop, **fields)


def run(engine: Engine, seed: int) -> dict[str, list[TokenOutput]]:
    """Sequences that come and go: a few at once, then none for some steps; some are removed while they run."""
    rng = random.Random(seed)
    outputs: dict[str, list[TokenOutput]] = {}
    to_come = [
        Sequence(str(number), [rng.randrange(1, 96) for _ in range(rng.randint(1, 30))], random_params(rng))
        for number in range(NUM_SEQUENCES)
    ]
    lives = {sequence.sequence_id: rng.randint(2, 12) for sequence in to_come if rng.random() < 0.2}
    while to_come or engine.has_work():
        if to_come and (not engine.has_work() or rng.random() < 0.1):
            for sequence in [to_come.pop() for _ in range(min(len(to_come), rng.randint(1, 6)))]:
                engine.add(sequence)
                outputs[sequence.sequence_id] = []
        for output in engine.step():
            outputs[output.sequence_id].append(output)
        for name, life in lives.items():
            if len(outputs.get(name, ())) == life:
                engine.remove(name)
    return outputs


@pytest.mark.parametrize("seed", range(6))
def test_tokens_are_the_same_with_and_without(model, seed):
    runner = WatchedRunner(model)
    engine = make_engine(runner)
    ahead = run(engine, seed)
    assert engine.kv_tokens_used == 0
    assert runner.events.count("launch behind") > 20
    assert runner.num_refuted > 0
    # Who is removed at a certain token may be so a step earlier: arrivals are by steps, and these differ.
    expected = run(make_engine(ModelRunner(model, num_blocks=64)), seed)
    for name, outputs in expected.items():
        common = min(len(outputs), len(ahead[name]))
        assert ahead[name][:common] == outputs[:common], name
        assert len(ahead[name]) == len(outputs), name


def test_the_next_step_is_launched_before_this_one_is_waited_for(model):
    runner = WatchedRunner(model)
    engine = make_engine(runner)
    engine.add(Sequence("a", [1, 2, 3], GenerationParams(4, temperature=0.0, ignore_eos=True)))
    tokens = [output.token_id for _ in range(4) for output in engine.step()]
    assert len(tokens) == 4
    assert not engine.has_work()
    assert runner.events == ["launch", *["launch behind", "wait"] * 3, "wait"]


def test_what_was_computed_for_a_sequence_that_ended_is_dropped(model):
    runner = WatchedRunner(model)
    engine = make_engine(runner)
    alone = Sequence("alone", [1, 2, 3], GenerationParams(20, temperature=0.0, ignore_eos=True))
    engine.add(alone)
    [first] = engine.step()
    engine.remove("alone")
    assert engine.kv_tokens_used == 0
    engine.add(Sequence("alone", [1, 2, 3], GenerationParams(2, temperature=0.0, ignore_eos=True)))
    again = [output.token_id for _ in range(3) for output in engine.step()]
    assert again[0] == first.token_id
    assert len(again) == 2


@pytest.mark.parametrize("fields", [{"presence_penalty": 0.5}, {"frequency_penalty": 0.5}])
def test_nothing_is_launched_ahead_where_a_draw_counts_the_tokens_before_it(model, fields):
    runner = WatchedRunner(model)
    engine = make_engine(runner)
    engine.add(Sequence("a", [1, 2, 3], GenerationParams(5, ignore_eos=True)))
    engine.add(Sequence("b", [1, 2, 3], GenerationParams(5, ignore_eos=True, **fields)))
    while engine.has_work():
        engine.step()
    assert "launch behind" not in runner.events


def test_nothing_is_launched_ahead_of_who_waits(model):
    runner = WatchedRunner(model)
    engine = make_engine(runner, max_sequences=1)
    for name in ("a", "b"):
        engine.add(Sequence(name, [1, 2, 3], GenerationParams(4, ignore_eos=True)))
    for _ in range(4):
        engine.step()
    assert "launch behind" not in runner.events
    while engine.has_work():
        engine.step()
    assert "launch behind" in runner.events


def test_a_runner_that_does_not_look_ahead_launches_one_batch_at_a_time(model):
    runner = WatchedRunner(model, looks_ahead=False)
    engine = make_engine(runner)
    engine.add(Sequence("a", [1, 2, 3], GenerationParams(4, ignore_eos=True)))
    while engine.has_work():
        engine.step()
    assert runner.events == ["launch", "wait"] * 4


def test_a_step_that_scores_is_followed_by_nothing(model):
    runner = WatchedRunner(model)
    engine = make_engine(runner)
    engine.add(ScoringSequence("s", [1, 2, 3, 4], 3, [5]))
    while engine.has_work():
        engine.step()
    assert runner.events == ["launch"]


def test_where_two_steps_find_no_memory_the_next_ones_go_alone(model):
    class SmallRunner(WatchedRunner):
        def launch_behind(self, batch, before):
            self.events.append("failed")
            raise OutOfDeviceMemoryError("no room for two")

    runner = SmallRunner(model)
    engine = make_engine(runner)
    engine.add(Sequence("a", [5, 6], GenerationParams(60, temperature=0.0, ignore_eos=True)))
    tokens = [output.token_id for _ in range(60) for output in engine.step()]
    assert runner.events.count("failed") == engine.num_out_of_memory == 1
    plain = make_engine(WatchedRunner(model, looks_ahead=False))
    plain.add(Sequence("a", [5, 6], GenerationParams(60, temperature=0.0, ignore_eos=True)))
    assert tokens == [output.token_id for _ in range(60) for output in plain.step()]


def test_a_batch_that_draws_nothing_is_waited_for(model, monkeypatch):
    waited: list[Fetch] = []
    monkeypatch.setattr(Fetch, "wait", lambda fetch: waited.append(fetch))
    chunk = Chunk(Sequence("a", [1, 2, 3], GenerationParams(4)), 0, 2)
    chunk.sequence.blocks.append(0)
    launched = ModelRunner(model, num_blocks=8).launch(Batch((chunk,)))
    assert not waited
    assert launched.wait() == ()
    assert len(waited) == 1


def test_a_batch_follows_none_that_draws_nothing(model):
    runner = ModelRunner(model, num_blocks=8, looks_ahead=True)
    with pytest.raises(TypeError, match="no batch can follow"):
        runner.launch_behind(Batch(()), Computed(()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for_while_steps_are_launched(make_checkpoint, monkeypatch):
    folder = make_checkpoint()
    config = load_config(folder)
    weights = load_weights(folder, config, dtype=torch.float16, device=torch.device("cuda"))
    runner = ModelRunner(NeoX(config, weights), num_blocks=64, max_decoding=4)
    runner.make_buckets()
    launch_behind = runner.launch_behind
    num_launched = 0

    def launch_without_waiting(batch, before):
        nonlocal num_launched
        num_launched += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch_behind(batch, before)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(runner, "launch_behind", launch_without_waiting)
    engine = make_engine(runner)
    for number, preset in enumerate(("k50", "nucleus9", "typical2")):
        params = {**PRESETS[preset], "max_new_tokens": 12}
        engine.add(Sequence(preset, [1, 2, 3], GenerationParams(seed=number, ignore_eos=True, **params)))
    while engine.has_work():
        engine.step()
    assert num_launched > 8
