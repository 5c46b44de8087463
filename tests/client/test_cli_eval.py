"""What the harness asks for is what the service is asked for, or refused with a reason."""

import time

import pytest
from lm_eval.api.instance import Instance
from oasst_cli.__main__ import app
from oasst_cli.eval.model import OasstLM
from oasst_client import InternalError, ItemScore, OverloadedError
from oasst_client.testing import FakeServer
from typer.testing import CliRunner


def generations(*wanted: dict) -> list[Instance]:
    return [Instance(request_type="generate_until", doc={}, arguments=("Why?", each), idx=0) for each in wanted]


def test_what_a_task_asks_of_a_generation_is_asked_of_the_service():
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 7, "until": "x", "max_gen_toks": 5}
    with FakeServer("Because it is so.") as server:
        answers = OasstLM(server.address).generate_until(generations({"until": ["\n", ""]}, drawn))
        requests = sorted(server.requests, key=lambda request: request.sampling.temperature)
    assert answers == ["Because it is so."] * 2
    greedy, sampled = requests
    assert (greedy.sampling.temperature, list(greedy.limits.stop), greedy.limits.max_new_tokens) == (0, ["\n"], 256)
    assert (sampled.sampling.temperature, sampled.sampling.top_k, list(sampled.limits.stop)) == (0.5, 7, ["x"])
    assert sampled.limits.max_new_tokens == 5


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ({"num_beams": 4}, "num_beams cannot be had"),
        ({"max_gen_toks": 0}, "max_gen_toks must be from 1 to 2047, is 0"),
        ({"max_gen_toks": 5000}, "max_gen_toks must be from 1 to 2047, is 5000"),
    ],
)
def test_what_cannot_be_had_is_told_before_anything_is_asked(wanted, complaint):
    with FakeServer() as server, pytest.raises(ValueError, match=complaint):
        OasstLM(server.address).generate_until(generations({}, wanted))
    assert server.requests == []


def test_a_task_that_the_service_does_not_allow_is_told_in_one_line(monkeypatch):
    def run_tasks(tasks, model, **_):
        model.generate_until(generations({"max_gen_toks": 5000}))

    monkeypatch.setattr("oasst_cli.eval.command.run_tasks", run_tasks)
    with FakeServer() as server:
        result = CliRunner().invoke(app, ["eval", "--address", server.address])
    assert (result.exit_code, result.stderr) == (2, "error: max_gen_toks must be from 1 to 2047, is 5000\n")


def test_a_generation_that_fails_ends_the_others():
    failed = InternalError("broken", code="INTERNAL", reason="NUMERIC")
    with FakeServer(failed) as server, pytest.raises(InternalError):
        OasstLM(server.address, num_concurrent=1).generate_until(generations(*[{}] * 50))
    assert len(server.requests) < 50


def test_a_generation_that_fails_ends_the_wait_of_the_others_for_their_next_attempt():
    full = OverloadedError("full", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL", retry_after_s=20)
    failed = InternalError("broken", code="INTERNAL", reason="NUMERIC")
    with FakeServer(full, failed) as server:
        model = OasstLM(server.address, num_concurrent=2)
        begun_s = time.monotonic()
        with pytest.raises(InternalError):
            model.generate_until(generations({}, {}))
        assert time.monotonic() - begun_s < 10
        assert len(server.requests) == 2


def test_every_score_is_kept_for_a_run_that_goes_on():
    kept = {}
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=("The sky is", f" {word}"), idx=0)
        for word in ("blue", "green")
    ]
    with FakeServer(score=lambda item: ItemScore(-item.context_length / 2, True)) as server:
        model = OasstLM(server.address)
        model.cache_hook.add_partial = lambda kind, request, answer: kept.update({(kind, request): answer})
        answers = model.loglikelihood(requests)
    assert answers == [(-1.5, True)] * 2
    assert kept == {("loglikelihood", request.args): (-1.5, True) for request in requests}


def test_a_context_that_does_not_fit_loses_its_beginning():
    (request,) = [Instance(request_type="loglikelihood", doc={}, arguments=("a b c d", " e f"), idx=0)]
    with FakeServer() as server:
        OasstLM(server.address, max_length=4).loglikelihood([request])
        (item,) = server.score_requests[0].items
        assert (server.tokenizer.decode(item.token_ids), item.context_length) == (" b c d e f", 3)


def test_turns_become_oasst_text_that_the_assistant_goes_on_with():
    with FakeServer() as server:
        model = OasstLM(server.address)
    turns = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(turns) == "<|prompter|>Hi<|endoftext|><|assistant|>"
    begun = [*turns, {"role": "assistant", "content": "Hel"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == (
        "<|prompter|>Hi<|endoftext|><|assistant|>Hel"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--suite", "mine"], "there is no suite 'mine'"),
        (["--only", "chess"], "no task 'chess'"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(arguments, complaint):
    result = CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path):
    out = tmp_path / "no folder" / "eval.json"
    with FakeServer() as server:
        result = CliRunner().invoke(
            app, ["eval", "--address", server.address, "--out", str(out)], env={"COLUMNS": "400"}
        )
        assert (result.exit_code, server.score_requests) == (2, [])
    assert "eval.json cannot be written: No such file or directory" in result.stderr


def test_without_the_harness_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["eval"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "pip install '.[eval]'" in result.stderr
