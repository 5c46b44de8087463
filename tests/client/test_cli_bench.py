"""The load generator: what it sends and when, what it measures, and that it tells the truth about it."""

import itertools
import json
import statistics
from random import Random

import pytest
from oasst_cli.__main__ import app
from oasst_cli.bench.arrivals import ClosedLoad, OpenLoad
from oasst_cli.bench.measurement import Overhead, RequestRecord, summarize, tokens_per_s_over_time
from oasst_cli.bench.workload import Lengths, PromptFile, RandomPrompts, WorkloadError
from oasst_client import Client, Message, OverloadedError
from oasst_client.testing import FakeServer
from typer.testing import CliRunner

NO_OVERHEAD = Overhead(0, 0, 0, 0)


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture
def model():
    with FakeServer() as server, Client(server.address) as client:
        return client.model()


# -------------------------------------------------------------------------------- what is sent, and when


def gaps(load: OpenLoad) -> list[float]:
    due_times = load.due_times_s(Random(1))
    times = [next(due_times) for _ in range(20_000)]
    assert times[0] == 0
    return [after - before for before, after in itertools.pairwise(times)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_keep_their_rate_and_their_burstiness(burstiness):
    drawn = gaps(OpenLoad(rate_per_s=5, burstiness=burstiness))
    assert statistics.fmean(drawn) == pytest.approx(1 / 5, rel=0.06)
    assert statistics.pvariance(drawn) * 5**2 == pytest.approx(burstiness, rel=0.15)


def test_without_burstiness_arrivals_come_at_even_gaps():
    assert {round(gap, 6) for gap in gaps(OpenLoad(4, burstiness=0))} == {0.25}


def test_random_prompts_have_the_drawn_lengths_share_a_beginning_and_make_no_turns(model):
    workload = RandomPrompts(model, Lengths.parse("10-20"), Lengths.parse("7"), num_shared=30, seed=3)
    drawn = [workload.draw(Random(number)) for number in range(50)]
    assert {len(each.token_ids) for each in drawn} == set(range(40, 51))
    assert len({tuple(each.token_ids[:30]) for each in drawn}) == 1
    assert len({tuple(each.token_ids[30:]) for each in drawn}) == 50
    assert all(each.options == {"max_new_tokens": 7, "ignore_eos": True} for each in drawn)
    control = {model.control_tokens.prompter, model.control_tokens.assistant, model.control_tokens.end_of_text}
    assert not control & {token_id for each in drawn for token_id in each.token_ids}


def test_random_prompts_fit_the_model_beside_their_answer(model):
    workload = RandomPrompts(model, Lengths.parse("5000"), Lengths.parse("48"), num_shared=0, seed=0)
    assert len(workload.draw(Random(0)).token_ids) == 2048 - 48


def test_lengths_are_fixed_uniform_or_normal():
    random = Random(1)
    assert {Lengths.parse("7").draw(random) for _ in range(9)} == {7}
    assert {Lengths.parse("2-4").draw(random) for _ in range(99)} == {2, 3, 4}
    drawn = [Lengths.parse("100~10").draw(random) for _ in range(2000)]
    assert (statistics.fmean(drawn), statistics.pstdev(drawn)) == (pytest.approx(100, abs=1), pytest.approx(10, abs=1))


@pytest.mark.parametrize("text", ["", "0", "9-4", "a", "4-", "-4"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(WorkloadError):
        Lengths.parse(text)


def test_prompts_of_a_file_are_questions_or_conversations(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    lines = [json.dumps("Why?"), json.dumps({"prompt": "Who?"}), json.dumps({"messages": turns})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    read = PromptFile.read(tmp_path / "prompts.jsonl", None)
    conversation = [Message(each["role"], each["content"]) for each in turns]
    assert read.prompts == [[("user", "Why?")], [("user", "Who?")], conversation]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "Who?"}', "must be a string"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}', r"messages\[1\] must"),
        ('{"messages": [{"role": "user", "content": 5}]}', r"messages\[0\] must have a role .* and a content, a text"),
        ('{"messages": ["Who?"]}', r"messages\[0\] must have a role \(.*user.*\)"),
    ],
)
def test_a_prompt_of_another_form_is_refused_with_its_line(tmp_path, line, complaint):
    (tmp_path / "prompts.jsonl").write_text(f'"Why?"\n{line}')
    with pytest.raises(WorkloadError, match=rf"prompts\.jsonl:2:? {complaint}"):
        PromptFile.read(tmp_path / "prompts.jsonl", None)


# -------------------------------------------------------------------------------- what is measured


def test_latencies_count_from_when_a_request_was_due():
    record = RequestRecord(
        due_s=1.0, sent_s=1.5, ended_s=5.0, delta_times_s=(2.0, 2.5, 4.0), delta_tokens=(1, 1, 2), queue_s=0.25
    )
    assert (record.ttft_s, record.e2e_s, record.num_tokens) == (1.0, 4.0, 4)
    assert record.itls_s == [0.5, 1.5]
    assert record.tpot_s == pytest.approx(2.0 / 3)


def test_a_summary_tells_percentiles_throughput_goodput_and_failures():
    records = [
        RequestRecord(0.0, 0.0, ended_s=index + 1.0, delta_times_s=(index + 1.0,), delta_tokens=(2,), prompt_tokens=5)
        for index in range(100)
    ]
    records.append(RequestRecord(0.0, 0.0, ended_s=50.0, delta_times_s=(), delta_tokens=(), error="QUEUE_FULL"))
    summary = summarize(ClosedLoad(4), records, limits_s={"ttft": 10.0, "itl": 0.1}, overhead=NO_OVERHEAD)
    ttft = summary.latencies_s["ttft"]
    assert (ttft.mean, ttft.p50, ttft.p90, ttft.p99, ttft.max) == pytest.approx((50.5, 50.5, 90.1, 99.01, 100))
    assert "itl" not in summary.latencies_s
    assert (summary.num_finished, summary.num_good, summary.errors) == (100, 10, {"QUEUE_FULL": 1})
    assert (summary.duration_s, summary.output_tokens_per_s, summary.goodput_per_s) == (100, 2, 0.1)
    assert (summary.prompt_tokens, summary.output_tokens) == (500, 200)


def test_tokens_are_counted_in_the_window_they_came_in():
    record = RequestRecord(0, 0, 4, delta_times_s=(0.5, 0.9, 3.0), delta_tokens=(1, 2, 4))
    assert tokens_per_s_over_time([record], window_s=1.0) == [(0.5, 3), (1.5, 0), (2.5, 0), (3.5, 4)]


# -------------------------------------------------------------------------------- the command


def test_a_benchmark_sends_its_load_and_measures_all_of_it(tmp_path):
    out, plots = tmp_path / "out.json", tmp_path / "plots"
    with FakeServer(lambda request: " a" * request.limits.max_new_tokens) as server:
        result = run(
            *("--rate", 50, "--rate", 100, "--num-requests", 10, "--warmup", 2, "--output-tokens", 8),
            *("--out", out, "--plots", plots, "--json", "--address", server.address, "--slo", "e2e=60"),
        )
        assert result.exit_code == 0, result.output
        assert len(server.requests) == 2 * 12
    summaries = json.loads(result.stdout)
    assert [(each["name"], each["num_finished"], each["output_tokens"]) for each in summaries] == [
        ("50/s", 10, 80),
        ("100/s", 10, 80),
    ]
    assert all(each["num_good"] == 10 and each["latencies_s"]["itl"]["p50"] > 0 for each in summaries)
    loads = json.loads(out.read_text())["loads"]
    due = [request["due_s"] for request in loads[0]["requests"]]
    assert len(set(due)) == 10
    assert {path.name for path in plots.iterdir()} == {
        "latency-cdf.png",
        "tokens-over-time.png",
        "latency-over-load.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.iterdir())


@pytest.mark.parametrize(("option", "place"), [("--out", "."), ("--out", "missing/file"), ("--plots", "file/inside")])
def test_where_nothing_can_be_written_nothing_is_measured(tmp_path, option, place):
    (tmp_path / "file").touch()
    with FakeServer() as server:
        result = run(option, tmp_path / place, "--address", server.address)
    assert (result.exit_code, server.requests) == (2, [])
    assert option in result.stderr


def test_refusals_are_measured_and_told_by_the_exit_code():
    full = OverloadedError("full", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL", retry_after_s=30)
    with FakeServer("a b", full) as server:
        result = run("--concurrency", 2, "--num-requests", 3, "--warmup", 1, "--address", server.address)
    assert result.exit_code == 1
    assert "3 QUEUE_FULL" in result.stdout


def test_the_tool_measures_itself_on_a_service_that_answers_at_once():
    result = run("--overhead", "--concurrency", 2, "--num-requests", 6, "--output-tokens", 20, "--json")
    assert result.exit_code == 0, result.output
    (summary,) = json.loads(result.stdout)
    assert (summary["prompt_tokens"], summary["output_tokens"]) == (6 * 128, 120)
    assert summary["overhead"]["cpu_s_per_token"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", 1, "--concurrency", 1],
        ["--rate", 0],
        ["--slo", "speed=1"],
        ["--slo", "ttft=fast"],
        ["--prompt-tokens", "many"],
        ["--prompts", "missing.jsonl"],
    ],
)
def test_an_option_that_cannot_be_meant_is_exit_code_2(arguments):
    with FakeServer() as server:
        assert run(*arguments, "--address", server.address).exit_code == 2
