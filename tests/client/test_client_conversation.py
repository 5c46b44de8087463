"""Conversations keep their turns, whole exchanges only."""

import json
import math
from collections.abc import Iterator

import pytest
from oasst_client import AsyncClient, AsyncConversation, Client, Conversation, InternalError, Message, Role
from oasst_client.testing import FakeServer

TEXT = "An idea that spreads."


def contents(request):
    return [message.content for message in request.conversation.messages]


def test_each_question_is_asked_with_the_turns_before_it(server, client):
    conversation = Conversation(client, messages=[("user", "Hi"), ("assistant", "Hello!")], system="Be brief.")
    conversation.ask("What is a meme?")
    with conversation.ask_stream("And who coined the word?") as stream:
        assert "".join(stream) == TEXT
    assert contents(server.requests[0]) == ["Be brief.", "Hi", "Hello!", "What is a meme?"]
    assert contents(server.requests[1]) == [*contents(server.requests[0]), TEXT, "And who coined the word?"]
    assert conversation.messages[-2:] == (
        Message(Role.USER, "And who coined the word?"),
        Message(Role.ASSISTANT, TEXT),
    )


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(server, client):
    def script(request, context):
        yield server.accepted(request)
        yield server.delta(0, "Well, ")
        server.refuse(context, 13, "broken", server.error_info("NUMERIC"))

    server.script = script
    conversation = Conversation(client)
    with pytest.raises(InternalError):
        conversation.ask("Hi")
    with pytest.raises(InternalError), conversation.ask_stream("Hi") as stream:
        list(stream)
    assert conversation.messages == ()


def test_an_answer_that_is_left_early_leaves_the_conversation_as_it_was(server, client):
    conversation = Conversation(client)
    with conversation.ask_stream("Hi") as stream:
        next(iter(stream))
    assert conversation.messages == ()


def test_an_answer_is_remembered_once_however_often_it_is_read(client):
    conversation = Conversation(client)
    with conversation.ask_stream("Hi") as stream:
        stream.completion()
        stream.completion()
        list(stream)
    assert len(conversation.messages) == 2


def test_options_of_a_question_come_on_top_of_the_conversations(server, client):
    conversation = Conversation(client, temperature=0, max_new_tokens=5)
    conversation.ask("Hi", max_new_tokens=9)
    request = server.requests[0]
    assert (request.sampling.temperature, request.limits.max_new_tokens) == (0, 9)


@pytest.fixture
def echo() -> Iterator[Client]:
    """A service that answers every question with the number it comes at."""
    with FakeServer(*(f"answer {number}" for number in range(20))) as fake, Client(fake.address) as client:
        yield client


def turns(conversation):
    return [message.content for message in conversation.messages]


def test_regenerating_puts_another_answer_in_the_place_of_the_last(echo):
    conversation = Conversation(echo, system="Be brief.")
    conversation.ask("Why?")
    assert conversation.regenerate().text == "answer 1"
    assert turns(conversation) == ["Be brief.", "Why?", "answer 1"]
    with conversation.regenerate_stream() as stream:
        stream.completion()
    assert turns(conversation) == ["Be brief.", "Why?", "answer 2"]


def test_an_abandoned_regeneration_leaves_the_answer_there_was(server, client):
    conversation = Conversation(client)
    conversation.ask("Hi")
    with conversation.regenerate_stream() as stream:
        next(iter(stream))
    assert turns(conversation) == ["Hi", TEXT]


def test_editing_a_question_asks_it_anew_and_drops_what_came_after(echo):
    conversation = Conversation(echo)
    for question in ("one", "two", "three"):
        conversation.ask(question)
    conversation.edit("TWO", question=1)
    assert turns(conversation) == ["one", "answer 0", "TWO", "answer 3"]
    conversation.edit("zwei")
    assert turns(conversation) == ["one", "answer 0", "zwei", "answer 4"]


def test_a_question_that_is_not_there_cannot_be_edited(echo):
    with pytest.raises(IndexError, match="there is no question -1: the conversation has 0"):
        Conversation(echo).regenerate()


def test_a_fork_goes_its_own_way_with_the_same_options(echo):
    conversation = Conversation(echo, system="Be brief.", max_new_tokens=1)
    conversation.ask("one")
    conversation.ask("two")
    fork = conversation.fork(num_questions=1)
    fork.ask("three")
    assert turns(conversation) == ["Be brief.", "one", "answer", "two", "answer"]
    assert turns(fork) == ["Be brief.", "one", "answer", "three", "answer"]
    assert fork.options == conversation.options
    with pytest.raises(IndexError, match="there are no 3 questions"):
        conversation.fork(num_questions=3)


def test_a_saved_conversation_comes_back_with_turns_and_options(echo, tmp_path):
    conversation = Conversation(echo, system="Be brief.", temperature=0.5, logit_bias={7: -1.5}, truncation="error")
    conversation.ask("Why – é?")
    conversation.save(tmp_path / "chat.json")
    loaded = Conversation.load(echo, tmp_path / "chat.json")
    assert (loaded.messages, loaded.options) == (conversation.messages, conversation.options)
    assert Conversation.from_text(echo, conversation.to_text()).messages == conversation.messages


def test_a_conversation_that_cannot_be_saved_leaves_the_file_as_it_was(echo, tmp_path):
    file, link = tmp_path / "chat.json", tmp_path / "link.json"
    Conversation(echo, messages=[("user", "Why?")]).save(file)
    file.chmod(0o600)
    link.symlink_to(file)
    before = file.read_text()
    with pytest.raises(UnicodeEncodeError):
        Conversation(echo, messages=[("user", "\ud800")]).save(link)
    assert (file.read_text(), sorted(tmp_path.iterdir())) == (before, [file, link])
    Conversation(echo, messages=[("user", "Who?")]).save(link)
    assert "Who?" in file.read_text()
    assert (link.is_symlink(), file.stat().st_mode & 0o777) == (True, 0o600)


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"options": []}, "its options are no object"),
        ({"options": {"messages": []}}, "unknown options: messages"),
        ({"options": {"foo": 1}}, "unknown options: foo"),
        ({"options": {"logit_bias": [1]}}, "cannot convert"),
        ({"options": {"logit_bias": {"a": 1}}}, "invalid literal"),
        ({"options": {"temperature": "hot"}}, "temperature: must be real number"),
        ({"options": {"timeout_s": "long"}}, "must be real number"),
        ({"options": {"detach_grace_s": math.inf}}, "inf seconds are no duration"),
        ({"messages": [{"role": "user", "content": 5}]}, "bad argument type"),
    ],
)
def test_a_saved_conversation_that_no_request_can_carry_is_refused(echo, part, complaint):
    saved = {"format": "oasst-conversation", "version": 1, "options": {}, "messages": [], **part}
    with pytest.raises(ValueError, match=f"this is no saved conversation: .*{complaint}"):
        Conversation.from_json(echo, json.dumps(saved))


@pytest.mark.parametrize(
    ("saved", "complaint"),
    [
        ("{", "no saved conversation"),
        ("[]", "no saved conversation"),
        ('{"format": "other"}', "its format is 'other'"),
        ('{"format": "oasst-conversation", "version": 2}', "version 2 .* this client knows 1"),
        ('{"format": "oasst-conversation", "version": 1, "options": {}, "messages": [{"role": "cat"}]}', "role"),
    ],
)
def test_what_is_no_saved_conversation_is_refused(echo, saved, complaint):
    with pytest.raises(ValueError, match=complaint):
        Conversation.from_json(echo, saved)


def test_truncating_drops_the_fewest_oldest_exchanges_and_keeps_the_system_text(echo):
    conversation = Conversation(echo, system="Be brief.")  # Two words.
    for question in ("one", "two", "three"):
        conversation.ask(question)  # One word and two, four control tokens.
    assert conversation.num_tokens() == 2 + 3 * 7 + 1
    assert conversation.truncate(24) == 0
    assert conversation.truncate(23) == 2
    assert turns(conversation) == ["Be brief.", "two", "answer 1", "three", "answer 2"]
    assert conversation.truncate(0) == 4
    assert turns(conversation) == ["Be brief."]


async def test_the_async_conversation_has_the_same_calls():
    with FakeServer(*(f"answer {number}" for number in range(20))) as fake:
        async with AsyncClient(fake.address) as client:
            conversation = AsyncConversation(client)
            await conversation.ask("one")
            await conversation.regenerate()
            await conversation.edit("two")
            async with conversation.edit_stream("three") as stream:
                await stream.completion()
            assert turns(conversation) == ["three", "answer 3"]
            assert await conversation.num_tokens() == 8
            assert await conversation.fork().truncate(7) == 2
    shared = {name for name in vars(Conversation) if not name.startswith("_")}
    assert shared == {name for name in vars(AsyncConversation) if not name.startswith("_")}
