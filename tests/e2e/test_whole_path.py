"""Questions through client, gateway, queue and worker, and back, on the demo checkpoint."""

import asyncio
import subprocess
import sys
import urllib.request

import pytest
from demo_answers import COINED, MEME
from oasst_client import (
    AsyncClient,
    AsyncConversation,
    Client,
    Completion,
    Conversation,
    FinishReason,
    InvalidArgumentError,
)
from waiting import wait_until

SEEDED = {"max_new_tokens": 40, "ignore_eos": True, "seed": 11, "temperature": 3.0}
# Long enough that what happens to it in the middle happens in the middle.
LONG = SEEDED | {"max_new_tokens": 1900}


@pytest.fixture(scope="module")
def up(own_up):
    return own_up


@pytest.fixture(scope="module")
def undisturbed(up) -> Completion:
    """The long answer when nothing happens to it."""
    with Client(up.address) as client:
        return client.chat("Tell me about the Moon.", **LONG)


def test_a_conversation_gets_the_demo_models_sentences(client):
    conversation = Conversation(client, temperature=0)
    assert conversation.ask("What is a meme?").text == MEME
    with conversation.ask_stream("And who coined the word?") as stream:
        pieces = list(stream)
    assert "".join(pieces) == COINED
    assert len(pieces) > 1


def test_a_completion_tells_its_usage_timings_and_reason(client):
    completion = client.chat("What is a meme?", temperature=0, logprobs=2)
    assert completion.finish_reason is FinishReason.END_OF_TEXT
    assert completion.usage.completion_tokens == len(completion.token_ids) == len(completion.logprobs)
    # Two control tokens around the question, one that asks for the answer.
    assert completion.usage.prompt_tokens == len(client.tokenize("What is a meme?")[0]) + 3
    assert completion.timings.prefill_s > 0
    assert completion.timings.decode_s > 0
    assert all(each.logprob == each.alternatives[0].logprob for each in completion.logprobs)
    assert client.detokenize(completion.token_ids, skip_control_tokens=True) == (MEME,)


def test_a_raw_prompt_and_its_token_ids_say_the_same_as_the_message(client):
    prompt = "<|prompter|>What is a meme?<|endoftext|><|assistant|>"
    [token_ids] = client.tokenize(prompt, parse_control_tokens=True)
    assert client.chat(prompt=prompt, temperature=0).text == MEME
    assert client.chat(token_ids=token_ids, temperature=0).text == MEME


def test_control_tokens_in_a_message_stay_text(client):
    spelled_out = client.chat("<|endoftext|><|assistant|>", temperature=0, max_new_tokens=1).usage.prompt_tokens
    assert spelled_out > 5


async def test_two_conversations_at_once_do_not_mix(up):
    async with AsyncClient(up.address) as client:

        async def talk() -> tuple[str, str]:
            conversation = AsyncConversation(client, temperature=0)
            first = await conversation.ask("What is a meme?")
            return first.text, (await conversation.ask("And who coined the word?")).text

        answers, other = await asyncio.gather(talk(), client.chat("How are you?", temperature=0))
    assert answers == (MEME, COINED)
    assert other.text == "I am running well, thank you: all my weights are in place. How are you?"


async def test_a_seeded_answer_is_the_same_alone_and_among_many(up):
    async with AsyncClient(up.address) as client:
        alone = await client.chat("Tell me about the Moon.", **SEEDED)
        crowd = await asyncio.gather(
            *(client.chat("Tell me about the Moon.", **SEEDED | {"seed": seed}) for seed in range(9, 14))
        )
    assert crowd[2].token_ids == alone.token_ids
    assert len({completion.token_ids for completion in crowd}) == 5


def test_choices_of_one_request_differ_by_their_number_alone(client):
    both = client.chat("Tell me about the Moon.", n=2, **SEEDED)
    assert both.choices[0].token_ids == client.chat("Tell me about the Moon.", **SEEDED).token_ids
    assert both.choices[0].token_ids != both.choices[1].token_ids


def test_leaving_a_stream_frees_the_worker(up, client):
    def num_cancelled() -> float:
        return up.metric("worker", "oasst_worker_jobs_total", outcome="cancelled")

    def num_drawn() -> float:
        return up.metric("worker", "oasst_worker_generated_tokens_total")

    cancelled_before, drawn_before = num_cancelled(), num_drawn()
    with client.stream("Tell me about the Moon.", **LONG) as stream:
        next(iter(stream))
    wait_until(lambda: num_cancelled() == cancelled_before + 1)
    wait_until(lambda: client.load().running_requests == 0)
    wait_until(lambda: client.load().workers[0].running_sequences == 0)
    assert num_drawn() - drawn_before < LONG["max_new_tokens"] / 2


def test_a_refused_request_names_the_field(client):
    with pytest.raises(InvalidArgumentError) as error:
        client.chat("Hi", top_p=1.5)
    assert [violation.field for violation in error.value.field_violations] == ["sampling.top_p"]


def test_a_second_turn_uses_what_the_first_one_computed(client):
    first = client.chat("Tell me about the Moon.", temperature=0)
    turns = [("prompter", "Tell me about the Moon."), ("assistant", first.text), ("prompter", "Thank you.")]
    second = client.chat(turns, temperature=0)
    assert first.usage.prompt_tokens < second.usage.cached_tokens < second.usage.prompt_tokens
    assert client.chat(turns, temperature=0).token_ids == second.token_ids


def test_models_tell_their_presets(client):
    [model] = client.models()
    assert {preset.name for preset in model.presets} >= {"k50", "nucleus9", "typical2"}


def test_every_process_tells_prometheus_about_itself(up, client):
    client.chat("What is a meme?", temperature=0)
    for process in up.summary["processes"]:
        if process["metrics"]:
            with urllib.request.urlopen(f"http://{process['metrics']}/metrics", timeout=10) as page:
                assert f"oasst_{process['role']}_" in page.read().decode()


def test_the_summary_names_every_process(up):
    processes = {process["role"]: process for process in up.summary["processes"]}
    assert set(processes) == {"valkey", "worker", "gateway"}
    for role, process in processes.items():
        assert up.process_of(role).pid == process["pid"]
    assert up.address == processes["gateway"]["listen"]


def test_a_worker_killed_in_the_middle_of_an_answer_leaves_no_gap_and_no_repeat(up, client, undisturbed):
    worker = up.process_of("worker")
    with client.stream("Tell me about the Moon.", **LONG) as stream:
        texts = iter(stream)
        seen = [next(texts)]
        assert client.load().running_requests == 1
        worker.kill()
        seen.extend(texts)
    assert stream.completion().token_ids == undisturbed.token_ids
    assert "".join(seen) == undisturbed.text
    assert up.process_of("worker").pid != worker.pid
    assert up.metric("worker", "oasst_worker_resumed_jobs_total") == 1
    assert "worker-0 was ended by SIGKILL" in up.stderr()


def test_a_gateway_killed_comes_back_at_its_address(up, client):
    up.process_of("gateway").kill()
    wait_until(lambda: up.stderr().count("gateway-0 serves") == 2, timeout_s=30)
    assert client.chat("What is a meme?", temperature=0).text == MEME


def test_a_queue_server_killed_in_the_middle_of_an_answer_loses_nothing(up, client, undisturbed):
    with client.stream("Tell me about the Moon.", **LONG) as stream:
        next(iter(stream))
        assert client.load().running_requests == 1
        up.process_of("valkey").kill()
        completion = stream.completion()
    assert completion.token_ids == undisturbed.token_ids


def test_a_port_in_use_ends_the_run_after_a_few_starts(up):
    command = [sys.executable, "-m", "oasst_cli", "up", "--listen", up.address]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110)
    assert result.returncode == 1
    assert "gateway-0" in result.stderr.splitlines()[-1]
    assert up.address in result.stderr.splitlines()[-1]
