"""A model that is split over several processes computes what one process computes, and all of them end together."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oasst_worker.engine import Engine, EngineConfig, GenerationParams, ScoringSequence, Sequence
from oasst_worker.model import inputs
from oasst_worker.model.config import load_config
from oasst_worker.model.inputs import BLOCK_SIZE, AttentionSpan, StepInputs, StepRows
from oasst_worker.model.kernels import load_kernels
from oasst_worker.model.ranks import ConnectedRanks, ExchangeError, Share
from oasst_worker.model.weights import load_weights
from oasst_worker.runtime import RuntimeOptions, UnsupportedOptionError, build_executor
from oasst_worker.runtime import ranks as ranks_module
from oasst_worker.runtime.memory import machine_bytes
from oasst_worker.runtime.placement import weight_bytes
from oasst_worker.runtime.ranks import Command, LostRankError, RankProcesses, SplitModel, pack_rows, unpack_rows
from oasst_worker.runtime.runner import ModelRunner
from oasst_worker.runtime.split import Machine, UnsupportedSplitError, choose_split
from prompt_logits import prompt_logits
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

SIZES = {
    "vocab_size": 322,  # Four ranks have unequal parts of it.
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}
OPTIONS = RuntimeOptions(device="cpu", threads=1, kv_tokens=1024, split="none")


def make_folder(folder, **fields):
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES | fields))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("parallel"))


@pytest.fixture(params=[(2, True), (4, False)], ids=["2 ranks", "4 ranks, sequential residual"], scope="module")
def runners(request, tmp_path_factory) -> Iterator[tuple[ModelRunner, ModelRunner]]:
    """The same model in one process and in several."""
    num_ranks, parallel = request.param
    folder = make_folder(tmp_path_factory.mktemp("model"), use_parallel_residual=parallel)
    threads = 3 if num_ranks == 2 else 1
    split = build_executor(folder, replace(OPTIONS, threads=threads, split="tensor", num_ranks=num_ranks))
    yield build_executor(folder, OPTIONS), split
    split.ranks.close()


def prompt_of(length: int) -> list[int]:
    return torch.randint(1, 322, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def generate(runner: ModelRunner) -> list[list[int]]:
    engine = Engine(runner, EngineConfig(eos_token_id=0, max_positions=256, max_sequences=8, step_tokens=80))
    tokens: dict[str, list[int]] = {}
    for length in (1, 17, 70):
        params = GenerationParams(max_new_tokens=16, temperature=0)
        engine.add(Sequence(str(length), prompt_of(length), params))
    while engine.has_work():
        for output in engine.step():
            tokens.setdefault(output.sequence_id, []).append(output.token_id)
    return [tokens[length] for length in ("1", "17", "70")]


def test_logits_agree_with_one_process_within_1e_4(runners):
    alone, split = runners
    for length in (1, 17, 70):
        torch.testing.assert_close(
            prompt_logits(split, prompt_of(length)), prompt_logits(alone, prompt_of(length)), rtol=0, atol=1e-4
        )


def test_greedy_tokens_are_those_of_one_process(runners):
    alone, split = runners
    assert generate(split) == generate(alone)


def test_ranks_share_memory(runners):
    _, split = runners
    assert split.model._model.ranks.memory is not None
    assert split.model._model.has_compiled_layers
    assert not list(split.ranks.meeting_file.parent.glob("*.memory"))  # It would outlive a worker that is killed.


def test_ranks_of_which_one_cannot_share_memory_exchange_by_gloo(folder, monkeypatch):
    alone = build_executor(folder, OPTIONS)
    assert load_kernels("exchange") is not None
    monkeypatch.setenv("PATH", "")  # All our kernels are compiled; the other finds no compiler.
    split = build_executor(folder, replace(OPTIONS, split="tensor", num_ranks=2))
    with closing(split.ranks):
        assert split.model._model.ranks.memory is None
        assert generate(split) == generate(alone)


def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(runners):
    _, split = runners
    whole = prompt_logits(split, prompt_of(70))
    assert torch.equal(prompt_logits(split, prompt_of(70)[:16])[:16], whole[:16])


def test_a_step_exchanges_one_sum_a_layer_and_one_for_each_end(runners):
    _, split = runners
    config, traffic = split.model.config, split.model.traffic
    before = traffic.num_exchanges
    prompt_logits(split, prompt_of(5))
    sums_of_a_layer = 1 if config.parallel_residual else 2
    assert traffic.num_exchanges - before == config.num_layers * sums_of_a_layer + 2


def test_the_ranks_weights_together_are_the_checkpoint(folder):
    config = load_config(folder)
    whole = load_weights(folder, config, dtype=torch.float32)
    parts = [load_weights(folder, config, dtype=torch.float32, share=Share(rank, 4)) for rank in range(4)]
    assert torch.equal(torch.cat([part.head for part in parts]), whole.head)
    assert torch.equal(torch.cat([part.embed_in for part in parts]), whole.embed_in)
    ours, layers = [*whole.layers][1], [[*part.layers][1] for part in parts]
    qkv = torch.cat([layer.qkv_weight.view(3, 16, 64) for layer in layers], dim=1)
    assert torch.equal(qkv.reshape(192, 64), ours.qkv_weight)
    assert torch.equal(torch.cat([layer.dense_weight for layer in layers], dim=1), ours.dense_weight)
    assert torch.equal(torch.cat([layer.mlp_in_bias for layer in layers]), ours.mlp_in_bias)
    assert torch.equal(torch.cat([layer.mlp_out_weight for layer in layers], dim=1), ours.mlp_out_weight)
    assert [layer.mlp_out_bias is None for layer in layers] == [False, True, True, True]


def test_rows_arrive_as_they_were_packed():
    spans = [AttentionSpan(0, 2, 0, 2, [1]), AttentionSpan(2, 1, 9, 0, [2, 4])]
    rows = StepRows([5, 6, 7], [0, 1, 9], [16, 17, 41], spans, [2])
    assert unpack_rows(pack_rows(rows)) == rows


def test_a_steps_numbers_go_to_a_device_in_one_copy(monkeypatch):
    copies = []
    monkeypatch.setattr(inputs, "to_device", lambda numbers, *_: copies.append(numbers) or torch.tensor(numbers))
    rows = StepRows([5, 6, 7], [0, 1, 9], [16, 17, 41], [], [2])
    on_device = rows.to(torch.device("cpu"))
    assert len(copies) == 1
    for name in ("token_ids", "positions", "cells", "drawing_rows"):
        assert getattr(on_device, name).tolist() == getattr(rows, name)


def test_other_ranks_are_told_what_the_host_knows_without_reading_it_from_the_device():
    unread = object()  # For a tensor: reading one takes until all that was launched before is done.
    rows = StepRows([5], [0], [16], [AttentionSpan(0, 1, 0, 1, [1])], [0])
    told: list[tuple[Command, list[int]]] = []
    processes = SimpleNamespace(tell=lambda *message: told.append(message))
    model = SimpleNamespace(forward=lambda inputs, cache: "logits", ranks=None)
    split = SplitModel(model, processes, SimpleNamespace(traffic=None))
    assert split.forward(StepInputs(unread, unread, unread, rows.spans, unread, rows), []) == "logits"
    assert told == [(Command.FORWARD, pack_rows(rows))]
    with pytest.raises(ValueError, match="tokens that the host does not know"):
        split.forward(StepInputs(unread, unread, unread, rows.spans, unread), [])


@pytest.mark.parametrize(
    ("kind", "num_ranks", "num_gpus", "expected"),
    [
        ("auto", None, 0, ("none", 1)),
        ("auto", None, 1, ("none", 1)),
        ("auto", None, 2, ("tensor", 2)),
        ("auto", None, 3, ("tensor", 2)),  # Four heads over three GPUs: two of them.
        ("auto", 4, 0, ("tensor", 4)),
        ("none", None, 8, ("none", 1)),
        ("tensor", None, 4, ("tensor", 4)),
        ("tensor", 2, 0, ("tensor", 2)),
        ("layers", None, 0, ("layers", 1)),
    ],
)
def test_the_split_is_chosen_by_options_and_machine(folder, kind, num_ranks, num_gpus, expected):
    split = choose_split(load_config(folder), kind, num_ranks, Machine([80] * num_gpus, 75, 10))
    assert (split.kind, split.num_ranks) == expected
    assert split.reason


@pytest.mark.parametrize(
    ("num_heads", "machine", "kind"),
    [
        (4, Machine([24, 24], 40, 2), "tensor"),
        (4, Machine([24, 10], 40, 2), "layers"),  # A half does not fit the smaller one.
        (3, Machine([24, 24], 40, 2), "layers"),  # Two ranks do not divide three heads.
        (4, Machine([24, 24], 40, 2, has_placement=True), "layers"),
        (4, Machine([24], 40, 2), "none"),
    ],
)
def test_auto_takes_layers_where_a_tensor_split_does_not_fit(folder, num_heads, machine, kind):
    split = choose_split(replace(load_config(folder), num_heads=num_heads), "auto", None, machine)
    assert (split.kind, split.num_ranks) == (kind, 2 if kind == "tensor" else 1)


@pytest.mark.parametrize(("gpu_bytes", "kind"), [([42, 8], "none"), ([41, 41], "tensor")])
def test_auto_leaves_a_model_on_one_gpu_that_holds_it_and_a_cache_of_use(folder, gpu_bytes, kind):
    split = choose_split(load_config(folder), "auto", None, Machine(gpu_bytes, 40, 2))
    assert split.kind == kind
    assert ("--split tensor takes all 2" in split.reason) is (kind == "none")


@pytest.mark.parametrize(
    ("kind", "num_ranks", "num_gpus", "said"),
    [
        ("tensor", 3, 0, "--num-ranks 3 does not divide the model's 4 attention heads"),
        ("tensor", None, 0, "on a CPU give --num-ranks"),
        ("tensor", 4, 2, "--num-ranks 4 needs as many GPUs, and there are 2"),
        ("none", 2, 0, "leave one out"),
        ("layers", 2, 0, "--split layers is one process"),
    ],
)
def test_a_split_that_cannot_be_is_refused_with_what_to_change(folder, kind, num_ranks, num_gpus, said):
    with pytest.raises(UnsupportedSplitError, match=said):
        choose_split(load_config(folder), kind, num_ranks, Machine([80] * num_gpus, 75, 10))


def test_a_bad_split_stops_before_a_process_is_started(folder):
    with pytest.raises(UnsupportedOptionError, match="does not divide"):
        build_executor(folder, replace(OPTIONS, split="tensor", num_ranks=3))


def test_a_killed_rank_is_noticed_at_once_and_fails_the_next_step(folder):
    runner = build_executor(folder, replace(OPTIONS, split="tensor", num_ranks=2))
    os.kill(runner.ranks._processes[1].pid, signal.SIGKILL)
    with pytest.raises(LostRankError, match="rank 1 of the model ended with exit code -9"):
        runner.ranks.lost.result(timeout=5)
    with pytest.raises(RuntimeError):
        prompt_logits(runner, prompt_of(5))
    runner.ranks.close()


def test_a_rank_that_dies_when_the_others_wait_to_meet_it_ends_the_start(folder, monkeypatch):
    """Killed once it has said that it is ready: a library would wait for it for minutes."""
    wait_until_ready = RankProcesses.wait_until_ready

    def wait_and_kill(processes):
        answers = wait_until_ready(processes)
        os.kill(processes._processes[1].pid, signal.SIGKILL)
        return answers

    monkeypatch.setattr(RankProcesses, "wait_until_ready", wait_and_kill)
    with pytest.raises(UnsupportedOptionError, match="rank 1 of the model ended with exit code -9"):
        build_executor(folder, replace(OPTIONS, split="tensor", num_ranks=2))


PRINTING_FOLLOWER = """
import os, sys
from oasst_worker.runtime import follow

def load(told, answers):
    print("from Python")
    os.write(1, b"from a library\\n")
    follow._answer(answers, "loaded")

follow._load = load
sys.exit(follow.main())
"""


def test_what_a_rank_prints_is_no_answer():
    follower = subprocess.run(
        [sys.executable, "-c", PRINTING_FOLLOWER], input=b'{"rank": 1}\n', capture_output=True, check=True
    )
    assert follower.stdout == b"loaded\n"
    assert sorted(follower.stderr.splitlines()) == [b"from Python", b"from a library"]


def test_the_rank_with_the_least_memory_decides_how_large_the_cache_is(folder, monkeypatch):
    answered: list[list[str]] = []
    wait = RankProcesses.wait_until_ready
    bytes_of_cache = 100 * 2 * 3 * 64 * 4
    bytes_of_weights = weight_bytes(load_config(folder), torch.float32)  # Of all ranks together.

    def wait_for_little(self):
        answered.append(wait(self))
        return [str(bytes_of_weights + 2 * bytes_of_cache)]  # Half of what the weights leave is the cache's.

    monkeypatch.setattr(RankProcesses, "wait_until_ready", wait_for_little)
    split = build_executor(folder, replace(OPTIONS, kv_tokens=None, split="tensor", num_ranks=2))
    split.ranks.close()
    assert split.num_blocks == 100 // BLOCK_SIZE
    [memory] = answered[-1]
    assert int(memory) == machine_bytes()


def test_a_rank_that_does_not_listen_ends_with_the_worker_that_tells_it(folder):
    ranks = build_executor(folder, replace(OPTIONS, split="tensor", num_ranks=2)).ranks
    os.kill(ranks._processes[1].pid, signal.SIGSTOP)
    failures: list[LostRankError] = []

    def tell() -> None:
        try:
            ranks.tell(Command.HIDDEN, [0] * 1_000_000)  # More than a pipe holds.
        except LostRankError as error:
            failures.append(error)

    engine = threading.Thread(target=tell, daemon=True)
    engine.start()
    engine.join(0.5)
    assert engine.is_alive()
    ending = threading.Thread(target=lambda: (ranks.kill(), ranks.close()), daemon=True)
    ending.start()
    ending.join(10)
    engine.join(10)
    assert not ending.is_alive()
    assert len(failures) == 1
    assert not ranks.lost.done()


def test_ranks_that_do_not_end_are_waited_for_together_and_then_killed(monkeypatch):
    """As if each were inside an exchange with one that is gone."""
    ranks = RankProcesses(4, {})
    processes = [*ranks._processes.values()]
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    now_s, waited_s, wait = 0.0, [], subprocess.Popen.wait

    def wait_in_vain(process, timeout=None):
        nonlocal now_s
        if timeout is None:
            return wait(process)
        now_s += timeout
        waited_s.append(timeout)
        raise subprocess.TimeoutExpired("", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_in_vain)
    monkeypatch.setattr(ranks_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    ranks.close()
    assert sum(waited_s) == ranks_module._ENDING_S
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 3


@pytest.fixture(scope="module", params=[{"dtype": "bfloat16"}, {"quantize": "int8"}], ids=["bf16", "int8"])
def narrow_runners(request, folder) -> Iterator[tuple[ModelRunner, ModelRunner]]:
    """In fewer bits, in one process and in two."""
    options = replace(OPTIONS, **request.param)
    split = build_executor(folder, replace(options, split="tensor", num_ranks=2))
    yield build_executor(folder, options), split
    split.ranks.close()


def test_in_fewer_bits_ranks_differ_from_one_process_no_more_than_that_does_from_fp32(folder, runners, narrow_runners):
    exact = prompt_logits(build_executor(folder, OPTIONS), prompt_of(70))
    alone, split = (prompt_logits(runner, prompt_of(70)) for runner in narrow_runners)
    rounding = (alone - exact).square().mean().sqrt()
    assert (split - alone).square().mean().sqrt() < 1.5 * rounding
    assert (split - exact).square().mean().sqrt() < 1.5 * rounding


def test_in_fewer_bits_a_rows_bits_do_not_depend_on_the_rows_beside_it(narrow_runners):
    _, split = narrow_runners
    whole = prompt_logits(split, prompt_of(70))
    assert torch.equal(prompt_logits(split, prompt_of(70)[:16])[:16], whole[:16])


def test_scores_are_those_of_one_process(runners):
    def scores(runner: ModelRunner) -> list[tuple[list[float], list[bool]]]:
        engine = Engine(runner, EngineConfig(eos_token_id=0, max_positions=256, max_sequences=8, step_tokens=80))
        for length in (2, 17, 70):
            engine.add(ScoringSequence(str(length), prompt_of(length), length // 2, [7, 8]))
        outputs = []
        while engine.has_work():
            outputs += engine.step()
        outputs.sort(key=lambda output: output.sequence_id)
        tokens = [each for output in outputs for each in output.continuations]
        return [([each.logprob for each in one], [each.is_best for each in one]) for one in tokens]

    alone, split = (scores(runner) for runner in runners)
    assert [flags for _, flags in split] == [flags for _, flags in alone]
    for ours, theirs in zip(split, alone, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)


def test_guessing_ahead_changes_no_token_of_a_split_model(runners):
    _, split = runners

    def answers(speculate: int) -> tuple[list[int], int]:
        config = EngineConfig(eos_token_id=0, max_positions=256, max_sequences=8, step_tokens=80, speculate=speculate)
        engine = Engine(split, config, clock=lambda: 0.0)
        engine.add(Sequence("a", prompt_of(9) * 4, GenerationParams(max_new_tokens=80, temperature=0, ignore_eos=True)))
        tokens = []
        while engine.has_work():
            tokens += [output.token_id for output in engine.step()]
        return tokens, engine.num_drafted_tokens

    plain, no_drafts = answers(0)
    guessed, num_drafts = answers(4)
    assert guessed == plain
    assert no_drafts == 0 < num_drafts


class DeafGroup:
    """What the others give does not arrive: everyone gets back what is its own."""

    class Done:
        def wait(self) -> None:
            pass

    def allgather(self, outputs, inputs) -> Done:
        for output in outputs[0]:
            output.copy_(inputs[0])
        return self.Done()

    def gather(self, outputs, inputs, options) -> Done:
        return self.allgather(outputs, inputs) if outputs else self.Done()

    def broadcast(self, tensors, options) -> Done:
        return self.Done()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_hear_each_other_do_not_start(rank):
    with pytest.raises(ExchangeError, match=f"rank {rank} of the model .* --split none"):
        ConnectedRanks(Share(rank, 2), DeafGroup()).check(torch.device("cpu"))
