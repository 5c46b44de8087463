"""Sampling reports: read and written in the original tool's format, made in parts, described and compared."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from oasst.v1 import chat_pb2
from oasst_cli.__main__ import app
from oasst_cli.report.analysis import compare_reports, describe_report
from oasst_cli.report.configs import NOPREFIX, SamplingConfig, chat_options, read_configs
from oasst_cli.report.document import PromptResults, Report, ReportError, SamplingResult, read_prompts
from oasst_cli.report.screen import draw_comparison
from oasst_client import InternalError
from oasst_client.testing import FakeServer
from typer.testing import CliRunner

NUM_REQUESTS_PER_PROMPT = len(NOPREFIX)


def report_of(*prompts: tuple[str, dict[str, list[str]]]) -> Report:
    return Report(
        model_name="m",
        date="2023-04-03T20:32:13.225641",
        args={"seed": 42, "n": None},
        prompts=tuple(
            PromptResults(text, tuple(SamplingResult(name, {}, tuple(outputs)) for name, outputs in results.items()))
            for text, results in prompts
        ),
    )


def run(*arguments: object):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in ("Why?", "Who – é?", "a\nb")))
    return path


# ------------------------------------------------------------------------------------------------------ the document


def test_a_report_comes_back_character_for_character(tmp_path):
    text = json.dumps(
        {
            "model_name": "m",
            "date": "2023-04-03T20:32:13.225641",
            "args": {"seed": 42, "n": None},
            "prompts": [
                {
                    "prompt": "é",
                    "results": [{"sampling_config": "k50", "sampling_params": {"top_p": 0.9}, "outputs": ["a", "b"]}],
                }
            ],
        },
        indent=2,
    )
    path = tmp_path / "report.json"
    path.write_text(text)
    assert Report.read(path).to_json() == text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[", "cannot be read"),
        ("[]", "the report needs 'prompts', a list"),
        ('{"prompts": [{"prompt": 1, "results": []}], "model_name": "", "date": "", "args": {}}', r"prompts\[0\]"),
        (
            '{"prompts": [{"prompt": "", "results": [{"outputs": [1]}]}], "model_name": "", "date": "", "args": {}}',
            r"prompts\[0\]\.results\[0\]\.outputs must be strings",
        ),
    ],
)
def test_what_is_no_report_is_refused_with_the_place(tmp_path, content, complaint):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ReportError, match=complaint):
        Report.read(path)


@pytest.mark.parametrize(("line", "complaint"), [("Why?", r":2 is not JSON"), ('{"a": 1}', ":2 must be a JSON string")])
def test_a_prompt_that_is_no_json_string_is_refused_with_its_line(tmp_path, line, complaint):
    (tmp_path / "prompts.jsonl").write_text(f'"Why?"\n{line}\n')
    with pytest.raises(ReportError, match=complaint):
        read_prompts(tmp_path / "prompts.jsonl")


def test_prompts_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"a\u2028b\u0085c"\r\n\n"d"\n', encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "prompts.jsonl") == ["a\u2028b\u0085c", "d"]


# ------------------------------------------------------------------------------------------------------- the configs


def test_configs_mean_what_generate_did_with_them():
    meant = {config.name: chat_options(config) for config in NOPREFIX}
    common = {"max_new_tokens": 400, "min_new_tokens": 4, "repetition_penalty": 1.2}
    assert meant == {
        "nucleus9": {**common, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
        "k50": {**common, "temperature": 1.0, "top_k": 50, "top_p": 0.95},
        "typical2": {**common, "temperature": 1.0, "top_k": 50, "typical_p": 0.2},
        "typical3": {**common, "temperature": 0.8, "top_k": 50, "typical_p": 0.3},
        # Sampling is on, so there was no contrastive search.
        "contrastive": {**common, "temperature": 1.0, "top_k": 5},
        "greedy": {**common, "temperature": 0.0},
    }


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"num_beams": 4}, "num_beams must be 1"),
        ({"penalty_alpha": 0.6, "top_k": 5}, "contrastive search"),
        ({"do_sample": True, "epsilon_cutoff": 0.1}, "epsilon_cutoff is not known"),
    ],
)
def test_a_config_that_cannot_be_had_is_refused(params, complaint):
    with pytest.raises(ReportError, match=complaint):
        chat_options(SamplingConfig("x", {"max_new_tokens": 4, **params}))


def test_a_config_file_adds_its_defaults_to_each_config(tmp_path):
    path = tmp_path / "configs.json"
    default = {"generate_args": {"max_new_tokens": 9, "do_sample": True}, "add_prefix_tokens": False}
    file = {"default": default, "configurations": [{"name": "a", "generate_args": {"top_k": 3}}]}
    path.write_text(json.dumps(file))
    assert read_configs(path) == (SamplingConfig("a", {"max_new_tokens": 9, "do_sample": True, "top_k": 3}),)
    file["configurations"][0]["pre_text"] = "You are a helpful assistant."
    path.write_text(json.dumps(file))
    with pytest.raises(ReportError, match="prefixes are not supported"):
        read_configs(path)


# ------------------------------------------------------------------------------------------------------------ making


def test_a_report_has_every_prompt_under_every_config(prompts, tmp_path):
    with FakeServer(lambda request: f"to {request.conversation.messages[0].content}") as server:
        result = run(prompts, "--out", tmp_path / "out.json", "--address", server.address, "--json")
    assert result.exit_code == 0, result.output
    made = Report.read(tmp_path / "out.json")
    assert [each.prompt for each in made.prompts] == ["Why?", "Who – é?", "a\nb"]
    assert [each.sampling_config for each in made.prompts[0].results] == [each.name for each in NOPREFIX]
    assert [each.sampling_params for each in made.prompts[0].results] == [each.params for each in NOPREFIX]
    assert [len(each.outputs) for each in made.prompts[0].results] == [2, 2, 2, 2, 2, 1]
    assert made.outputs_of("greedy") == ["to Why?", "to Who – é?", "to a\nb"]
    assert (made.model_name, made.args["seed"], made.args["device"]) == ("fake", 42, None)
    assert {request.priority for request in server.requests} == {chat_pb2.PRIORITY_BULK}
    assert len({request.sampling.seed for request in server.requests}) == len(server.requests)
    assert not (tmp_path / "out.json.partial").exists()


def test_a_run_that_was_stopped_goes_on_where_it_was_and_makes_the_same_report(prompts, tmp_path):
    out = tmp_path / "out.json"
    arguments = [prompts, "--out", out, "--concurrency", "1"]
    broken = InternalError("broken", code="INTERNAL", reason="NUMERIC")

    def seed(request):
        return str(request.sampling.seed)

    with FakeServer(*[seed] * (NUM_REQUESTS_PER_PROMPT + 2), broken) as server:
        assert isinstance(run(*arguments, "--address", server.address).exception, InternalError)
    journal = tmp_path / "out.json.partial"
    # As a kill in the middle of a write leaves it.
    journal.write_text(journal.read_text() + '{"index": 1, "pro')
    with FakeServer(seed) as server:
        result = run(*arguments, "--address", server.address, "--json")
        assert json.loads(result.stdout)["num_from_earlier_run"] == 1
        assert len(server.requests) == 2 * NUM_REQUESTS_PER_PROMPT
        assert run(prompts, "--out", tmp_path / "whole.json", "--address", server.address).exit_code == 0
    assert Report.read(out).prompts == Report.read(tmp_path / "whole.json").prompts


def test_a_journal_of_another_report_is_not_gone_on_with(prompts, tmp_path):
    with FakeServer(InternalError("broken", code="INTERNAL")) as server:
        run(prompts, "--out", tmp_path / "out.json", "--address", server.address)
        result = run(prompts, "--out", tmp_path / "out.json", "--seed", "1", "--address", server.address)
    assert result.exit_code == 2
    assert "was begun with other prompts or options" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["p.jsonl", "--stats", "r.json"], ["p.jsonl", "--plot", "x.png"]])
def test_what_is_asked_for_must_be_one_thing(arguments):
    assert run(*arguments).exit_code == 2


# ------------------------------------------------------------------------------------------------ describing, comparing

# As the original tool writes it: ASCII, nulls in `args`, absent parameters left out, one output of greedy.
ORIGINAL = r"""{
  "model_name": "somebody/a-model",
  "date": "2023-04-03T20:32:13.225641",
  "args": {"device": "cuda", "seed": 42, "n": null, "half": true, "auth_token": null},
  "prompts": [
    {"prompt": "caf\u00e9?\nWhy?", "results": [
      {"sampling_config": "k50", "sampling_params": {"do_sample": true, "top_k": 50}, "outputs":
        [" \ud83d\ude00 yes\n<|endoftext|>", "cut in the mid"]},
      {"sampling_config": "greedy", "sampling_params": {"do_sample": false, "num_beams": 1}, "outputs":
        ["<|endoftext|>"]}]},
    {"prompt": "Who?", "results": [
      {"sampling_config": "k50", "sampling_params": {"do_sample": true, "top_k": 50}, "outputs":
        ["a <|endoftext|> inside", "four<|endoftext|>"]},
      {"sampling_config": "greedy", "sampling_params": {"do_sample": false, "num_beams": 1}, "outputs":
        ["no end"]}]}
  ]
}"""


def test_a_report_of_the_original_tool_is_described(tmp_path):
    (tmp_path / "original.json").write_text(ORIGINAL)
    k50, greedy = json.loads(run("--stats", tmp_path / "original.json", "--json").stdout)
    # 7, 14, 22 and 4 characters: a pair of surrogates is one, and end-of-text is left out at the end alone.
    assert (k50["config"], k50["num_outputs"], k50["num_ended"], k50["ended_rate"]) == ("k50", 4, 2, 0.5)
    assert (k50["mean_chars"], k50["median_chars"], k50["max_chars"]) == (11.75, 10.5, 22)
    assert (greedy["config"], greedy["num_outputs"], greedy["num_ended"]) == ("greedy", 2, 1)
    assert (greedy["mean_chars"], greedy["median_chars"], greedy["max_chars"]) == (3, 3, 6)


def test_lengths_leave_end_of_text_out():
    (described,) = describe_report(report_of(("Why?", {"k50": ["abc<|endoftext|>", "abcdefg"]})))
    assert (described.num_outputs, described.num_ended, described.ended_rate) == (2, 1, 0.5)
    assert (described.mean_chars, described.median_chars, described.max_chars) == (5, 5, 7)


def test_reports_are_compared_output_by_output_of_the_prompts_they_share():
    first = report_of(("one", {"k50": ["abcd", "x"], "greedy": ["same"]}), ("mine", {"k50": ["q"]}))
    second = report_of(("theirs", {"k50": ["q"]}), ("one", {"greedy": ["same"], "k50": ["abXY", "x"]}))
    k50, greedy = compare_reports(first, second)
    assert (k50.config, k50.num_pairs, k50.num_equal, k50.first_divergences) == ("k50", 2, 1, (2,))
    assert k50.mean_shared_prefix == pytest.approx((0.5 + 1) / 2)
    assert (greedy.equal_rate, greedy.median_divergence) == (1, None)
    with pytest.raises(ReportError, match="share no prompt"):
        compare_reports(first, report_of(("other", {"k50": ["a"]})))


def test_a_comparison_is_told_and_drawn(tmp_path):
    for name, output in (("a.json", "abc<|endoftext|>"), ("b.json", "abd")):
        (tmp_path / name).write_text(report_of(("Why?", {"k50": [output], "greedy": ["same"]})).to_json())
    paths = (tmp_path / "a.json", tmp_path / "b.json")
    table = run("--compare", *paths, "--plot", tmp_path / "plots" / "both.png")
    assert table.exit_code == 0, table.output
    assert "50.0%" not in table.stdout
    assert "100.0%" in table.stdout
    assert (tmp_path / "plots" / "both.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(run("--compare", *paths, "--json").stdout)
    assert [(each["config"], each["equal_rate"]) for each in told["agreement"]] == [("k50", 0), ("greedy", 1)]


def test_reports_whose_names_begin_alike_and_whose_outputs_are_equal_are_drawn_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    name = "2023-04-03_somebody_a-model-with-a-long-name_sampling_{}.json"
    reports = (report_of(("Why?", {"k50": ["same"], "greedy": ["same"]})),) * 2
    names = (name.format("noprefix"), name.format("prefix"))
    draw_comparison(tmp_path / "both.png", names, reports, compare_reports(*reports))
    legends = {axes.get_title("left"): axes.get_legend() for axes in drawn[0].axes}
    texts = [each.get_text() for each in legends["Ended by the model"].get_texts()]
    assert [text[:3] for text in texts] == ["A: ", "B: "]
    assert legends["First difference, of the outputs that differ"] is None
