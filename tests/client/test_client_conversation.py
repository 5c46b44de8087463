"""Conversations keep their turns, whole exchanges only."""

import pytest
from oasst_client import Conversation, InternalError, Message, Role

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
