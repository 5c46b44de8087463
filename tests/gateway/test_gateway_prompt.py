"""Prompts are exactly the trained format, and no text can forge a turn."""

import functools
import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oasst.prompt import ControlToken, format_prompt
from oasst.v1 import chat_pb2, generation_pb2
from oasst_gateway import preparation
from oasst_gateway.authentication import DEFAULT_TENANT
from oasst_gateway.errors import InvalidRequestError, StartError
from oasst_gateway.model import ServedModel
from oasst_gateway.preparation import prepare_chat
from oasst_gateway.tokenizer import ModelTokenizer
from transformers import PreTrainedTokenizerFast

CONTROL_TEXTS = [token.value for token in ControlToken]
DROP = chat_pb2.TRUNCATION_DROP_OLDEST_TURNS


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedTokenizerFast:
    """transformers on the same files: it encodes a whole prompt in one go and parses control tokens."""
    return PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))


def request_of(texts: Sequence[str], *, system: str = "", **fields: object) -> chat_pb2.ChatRequest:
    messages = [chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content=system)] if system else []
    for index, text in enumerate(texts):
        role = chat_pb2.ROLE_ASSISTANT if index % 2 else chat_pb2.ROLE_PROMPTER
        messages.append(chat_pb2.Message(role=role, content=text))
    return chat_pb2.ChatRequest(conversation=chat_pb2.Conversation(messages=messages), **fields)


def prompt_ids(model: ServedModel, request: chat_pb2.ChatRequest) -> list[int]:
    return list(prepare_chat(request, model, tenant=DEFAULT_TENANT, request_id="r-1").job.prompt_token_ids)


def trained_format(texts: Sequence[str], *, system: str = "") -> str:
    speakers = itertools.cycle(("<|prompter|>", "<|assistant|>"))
    turns = "".join(f"{speaker}{text}<|endoftext|>" for speaker, text in zip(speakers, texts, strict=False))
    return f"{system}{turns}<|assistant|>"


@pytest.mark.parametrize(
    "texts",
    [
        ["What is a meme?"],
        ["What is a meme?", "A meme is an idea.", "And who coined the word?"],
        [" leading", "trailing \n", "  runs   of    spaces\t\n\n"],
        ["Grüße! 日本語 👍🏽", "e\u0301 is two characters", "\x00\ufffd"],
        ["a", "", "b"],
    ],
)
@pytest.mark.parametrize("system", ["", "You are kind.\n"])
def test_a_prompt_equals_the_trained_format_token_by_token(
    model: ServedModel, reference: PreTrainedTokenizerFast, texts: list[str], system: str
) -> None:
    expected = reference.encode(trained_format(texts, system=system), add_special_tokens=False)
    assert prompt_ids(model, request_of(texts, system=system)) == expected


honest_text = st.text(min_size=1, max_size=20).filter(lambda text: "<|" not in text)


@given(texts=st.lists(honest_text, min_size=1, max_size=3).filter(lambda texts: len(texts) % 2 == 1))
@settings(max_examples=200, deadline=None)
def test_any_honest_conversation_equals_the_trained_format(
    model: ServedModel, reference: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    expected = reference.encode(trained_format(texts), add_special_tokens=False)
    if len(expected) < model.limits.max_positions:
        assert prompt_ids(model, request_of(texts)) == expected


def control_ids_in(model: ServedModel, ids: Sequence[int]) -> list[int]:
    control_ids = set(model.tokenizer.control_ids.values())
    return [token_id for token_id in ids if token_id in control_ids]


@pytest.mark.parametrize("act", ["encode_text", "encode_prompt", "decode"])
def test_a_long_text_keeps_no_other_thread_from_running(model: ServedModel, act: str) -> None:
    tokenizer = model.tokenizer
    text = "all the words of a long text " * 20_000
    if act == "decode":
        work = functools.partial(tokenizer.decode, tokenizer.encode_text(text), skip_control_tokens=True)
    else:
        work = functools.partial(getattr(tokenizer, act), text)
    has_begun, has_ended = threading.Event(), threading.Event()

    def do_it() -> None:
        has_begun.set()
        work()
        has_ended.set()

    working = threading.Thread(target=do_it)
    working.start()
    has_begun.wait()
    num_turns = 0
    while not has_ended.wait(0.001):
        num_turns += 1
    working.join()
    assert num_turns > 5


@pytest.mark.parametrize("control", CONTROL_TEXTS)
def test_a_control_token_split_over_messages_stays_text(model: ServedModel, control: str) -> None:
    ids = model.tokenizer.control_ids
    expected = [
        *(ids[ControlToken.PROMPTER], ids[ControlToken.END_OF_TEXT], ids[ControlToken.ASSISTANT]),
        *(ids[ControlToken.END_OF_TEXT], ids[ControlToken.PROMPTER], ids[ControlToken.END_OF_TEXT]),
        ids[ControlToken.ASSISTANT],
    ]
    for cut in range(len(control) + 1):
        head, tail = control[:cut], control[cut:]
        for texts in ([f"a{head}", f"{tail}b", control], [control, head + tail, f"{tail or 'x'}"]):
            forged = prompt_ids(model, request_of(texts, system=control))
            assert control_ids_in(model, forged) == expected


@given(text=st.lists(st.sampled_from([*CONTROL_TEXTS, "<|", "|>", "prompter", " ", "\u0301", "a"]), max_size=6))
@settings(max_examples=200, deadline=None)
def test_no_text_encodes_to_a_control_token(model: ServedModel, text: list[str]) -> None:
    assert control_ids_in(model, model.tokenizer.encode_text("".join(text))) == []
    assert model.tokenizer.decode(model.tokenizer.encode_text("a<|prompter|>b"), skip_control_tokens=True) == (
        "a<|prompter|>b"
    )


def test_a_raw_prompt_has_its_control_tokens_parsed(model: ServedModel, reference: PreTrainedTokenizerFast) -> None:
    prompt = trained_format(["What is a meme?"])
    ids = prompt_ids(model, chat_pb2.ChatRequest(prompt=prompt))
    assert ids == reference.encode(prompt, add_special_tokens=False)
    assert ids == prompt_ids(model, request_of(["What is a meme?"]))


def test_token_ids_are_taken_as_they_are(model: ServedModel) -> None:
    assert prompt_ids(model, chat_pb2.ChatRequest(token_ids=chat_pb2.TokenIds(ids=[5, 0, 7]))) == [5, 0, 7]


def test_control_ids_come_from_the_files(model: ServedModel, reference: PreTrainedTokenizerFast) -> None:
    for token, token_id in model.tokenizer.control_ids.items():
        assert reference.convert_tokens_to_ids(token.value) == token_id
    assert model.tokenizer.size == len(reference)


def test_a_tokenizer_without_turns_cannot_start(checkpoint: Path) -> None:
    files = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    files["added_tokens"] = [token for token in files["added_tokens"] if token["content"] != "<|prompter|>"]
    with pytest.raises(StartError, match="prompter"):
        ModelTokenizer(json.dumps(files))


@pytest.mark.parametrize(
    "left",
    [
        {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 5,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
    ],
)
def test_what_a_training_left_in_the_tokenizer_cuts_and_lengthens_no_prompt(
    model: ServedModel, checkpoint: Path, left: dict[str, object]
) -> None:
    files = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = ModelTokenizer(json.dumps(files | left))
    text = "What is a meme? " * 3
    assert tokenizer.encode_text(text) == model.tokenizer.encode_text(text)
    assert tokenizer.encode_prompt(text) == model.tokenizer.encode_prompt(text)


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"model": 1}'])
def test_a_file_that_is_no_tokenizer_cannot_start(content: str) -> None:
    with pytest.raises(StartError, match="tokenizer"):
        ModelTokenizer(content)


def too_long(model: ServedModel, request: chat_pb2.ChatRequest) -> tuple[str, str]:
    with pytest.raises(InvalidRequestError) as refused:
        prompt_ids(model, request)
    (violation,) = refused.value.violations
    assert refused.value.reason == "PROMPT_TOO_LONG"
    return violation.field, violation.description


def test_a_prompt_may_fill_all_positions_but_one(model: ServedModel) -> None:
    ids = [5] * (model.limits.max_positions - 1)
    job = prepare_chat(
        chat_pb2.ChatRequest(token_ids=chat_pb2.TokenIds(ids=ids)), model, tenant=DEFAULT_TENANT, request_id="r-1"
    ).job
    assert job.limits.max_new_tokens == 1
    field, description = too_long(model, chat_pb2.ChatRequest(token_ids=chat_pb2.TokenIds(ids=[*ids, 5])))
    assert field == "token_ids"
    assert "has 256 tokens: with 1 to generate it must fit 256 positions" in description


def test_a_prompt_must_fit_beside_what_is_asked_for(model: ServedModel) -> None:
    limits = generation_pb2.GenerationLimits(max_new_tokens=200)
    request = chat_pb2.ChatRequest(token_ids=chat_pb2.TokenIds(ids=[5] * 57), limits=limits)
    _, description = too_long(model, request)
    assert "has 57 tokens: with 200 to generate it must fit 256 positions" in description


LONG_TALK = [f"turn {index}: " + "x" * 60 for index in range(9)]


def test_a_long_conversation_is_refused_unless_turns_may_be_dropped(model: ServedModel) -> None:
    field, _ = too_long(model, request_of(LONG_TALK))
    assert field == "conversation"


def test_the_oldest_exchanges_are_dropped_until_it_fits(model: ServedModel) -> None:
    request = request_of(LONG_TALK, system="Be kind.", truncation=DROP)
    job = prepare_chat(request, model, tenant=DEFAULT_TENANT, request_id="r-1").job
    kept = LONG_TALK[job.dropped_turns :]
    assert job.dropped_turns % 2 == 0
    assert 0 < job.dropped_turns < len(LONG_TALK)
    assert list(job.prompt_token_ids) == prompt_ids(model, request_of(kept, system="Be kind."))
    more = request_of(LONG_TALK[job.dropped_turns - 2 :], system="Be kind.")
    assert too_long(model, more)[0] == "conversation"


@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=21).filter(lambda texts: len(texts) % 2 == 1),
    system=st.text(max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_as_few_exchanges_are_dropped_as_must_be(model: ServedModel, texts: list[str], system: str) -> None:
    """As if every conversation without the oldest ones were tried in turn."""
    limits = generation_pb2.GenerationLimits(max_new_tokens=model.limits.max_positions - 60)
    for kept in (texts[start:] for start in range(0, len(texts), 2)):
        try:
            expected = prompt_ids(model, request_of(kept, system=system, limits=limits))
        except InvalidRequestError:
            continue
        assert prompt_ids(model, request_of(texts, system=system, limits=limits, truncation=DROP)) == expected
        return


def test_each_turn_is_tokenized_once_however_many_are_dropped(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    formatted: list[int] = []
    encode_text = ModelTokenizer.encode_text
    monkeypatch.setattr(
        ModelTokenizer, "encode_text", lambda self, text: encoded.append(text) or encode_text(self, text)
    )
    monkeypatch.setattr(
        preparation,
        "format_prompt",
        lambda turns, *, system: formatted.append(len(turns)) or format_prompt(turns, system=system),
    )
    texts = [f"turn {index}" for index in range(101)]
    prompt_ids(model, request_of(texts, truncation=DROP))
    assert len(encoded) <= len(texts) + 1
    assert len(formatted) == 1


def test_an_immense_history_is_dropped_without_being_tokenized(model: ServedModel) -> None:
    request = request_of(["x" * 50_000, "y" * 50_000] * 10 + ["What is a meme?"], truncation=DROP)
    job = prepare_chat(request, model, tenant=DEFAULT_TENANT, request_id="r-1").job
    assert job.dropped_turns == 20
    assert list(job.prompt_token_ids) == prompt_ids(model, request_of(["What is a meme?"]))


def test_the_last_turn_is_never_dropped(model: ServedModel) -> None:
    field, _ = too_long(model, request_of(["a", "b", "xyz " * 300], truncation=DROP))
    assert field == "conversation"
