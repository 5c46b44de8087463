"""What a chat does with the lines a person types, and how it shows answers."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oasst.v1 import generation_pb2
from oasst_cli.__main__ import app
from oasst_cli.chat.markdown import MarkdownStream, split_settled
from oasst_cli.chat.session import COMMANDS, ChatSession
from oasst_cli.up.command import chat_options
from oasst_client import ChatOptions, Client, Conversation, InternalError, Truncation
from oasst_client.testing import Answer, FakeServer
from rich.console import Console
from typer.testing import CliRunner


class Chat:
    """A session on a terminal of memory."""

    def __init__(self, client: Client, **options: object) -> None:
        self.console = Console(file=io.StringIO(), width=60)
        self.session = ChatSession(client, Conversation(client, **options), self.console, is_plain=False)

    def type(self, *lines: str) -> str:
        """What is shown after these lines."""
        for line in lines:
            self.session.handle(line)
        return self.console.file.getvalue()

    @property
    def turns(self) -> list[str]:
        return [message.content for message in self.session.conversation.messages]


@pytest.fixture
def server():
    with FakeServer(*(f"answer *{number}*" for number in range(9))) as server:
        yield server


@pytest.fixture
def chat(server):
    with Client(server.address) as client:
        yield Chat(client, system="Be brief.", seed=5)


def test_answers_are_shown_as_markdown_and_remembered(chat):
    assert "answer 0" in chat.type("Why?")
    assert chat.turns == ["Be brief.", "Why?", "answer *0*"]


def test_the_last_question_is_answered_anew_with_another_seed_or_asked_differently(chat, server):
    chat.type("Why?", "/again")
    assert chat.turns == ["Be brief.", "Why?", "answer *1*"]
    assert server.requests[0].sampling.seed == 5 != server.requests[1].sampling.seed
    chat.type("/edit Who?")
    assert chat.turns == ["Be brief.", "Who?", "answer *2*"]


def test_what_was_said_can_be_taken_back_and_forgotten(chat):
    chat.type("one", "two", "/back")
    assert chat.turns == ["Be brief.", "one", "answer *0*"]
    chat.type("/new")
    assert chat.turns == ["Be brief."]


@pytest.mark.parametrize("line", ["/back", "/again", "/edit Who?"])
def test_before_the_first_question_there_is_nothing_to_take_back_or_answer_anew(chat, line):
    assert "error: nothing was asked yet" in chat.type(line)


def test_a_preset_holds_from_now_on_in_place_of_what_was_asked_for_before(server):
    with Client(server.address) as client:
        chat = Chat(client, temperature=0, top_k=7, seed=5, max_new_tokens=9)
        assert "k50-Creative" in chat.type("/preset")
        chat.type("/preset nucleus9", "Why?", "/preset typical2", "Who?")
        assert "there is no preset fast" in chat.type("/preset fast")
    nucleus, typical = server.requests
    assert nucleus.sampling == generation_pb2.SamplingParams(preset="nucleus9", seed=5)
    assert typical.sampling == generation_pb2.SamplingParams(preset="typical2", seed=5)
    assert nucleus.limits.max_new_tokens == 9


def test_a_greedy_chat_says_that_it_would_answer_the_same_again(server):
    with Client(server.address) as client:
        chat = Chat(client, temperature=0)
        assert "the most likely token each time" in chat.type("Why?", "/again")
        assert chat.turns == ["Why?", "answer *0*"]
        chat.type("/preset k50", "/again")
        assert chat.turns == ["Why?", "answer *1*"]


def test_the_chat_of_a_stack_is_greedy_with_the_demo_alone():
    assert chat_options(None) == ("--temperature", "0")
    assert chat_options("OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5") == ("--preset", "k50")


def test_a_conversation_is_saved_and_gone_on_with(chat, tmp_path):
    chat.type("Why?", f"/save {tmp_path / 'chat.json'}", "/new", f"/load {tmp_path / 'chat.json'}", "Who?")
    assert chat.turns == ["Be brief.", "Why?", "answer *0*", "Who?", "answer *1*"]
    assert "No such file" in chat.type("/load nowhere.json")


def test_tokens_and_text_are_told(chat):
    chat.type("Why?")
    assert "10 of 2048 tokens" in chat.type("/tokens")
    assert "<|prompter|>Why?<|endoftext|>" in chat.type("/text")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("/jump", "there is no /jump"), ("/save", "it is /save FILE"), ("/new now", "it is /new")],
)
def test_a_command_that_is_wrong_says_what_it_is(chat, line, complaint):
    assert complaint in chat.type(line)


def test_help_names_every_command(chat):
    shown = chat.type("/help")
    assert all(name in shown for name in COMMANDS)


def test_an_answer_that_breaks_is_told_and_the_chat_goes_on():
    broken = Answer("half an", error=InternalError("the worker died", code="INTERNAL", reason="NUMERIC"))
    with FakeServer(broken, "whole") as server, Client(server.address) as client:
        chat = Chat(client)
        shown = chat.type("Why?", "Why?")
    assert shown.index("half an") < shown.index("error: the worker died") < shown.index("whole")
    assert chat.turns == ["Why?", "whole"]


def test_a_conversation_that_is_loaded_is_asked_with_the_options_of_the_command_line(server, tmp_path):
    with Client(server.address) as client:
        Conversation(client, messages=[("user", "a"), ("assistant", "b")], top_k=7).save(tmp_path / "chat.json")
        given = ChatOptions(temperature=0, truncation=Truncation.DROP_OLDEST_TURNS)
        session = ChatSession(client, Conversation(client, **given), Console(), is_plain=True, options=given)
        session.handle(f"/load {tmp_path / 'chat.json'}")
        assert session.conversation.options == {"top_k": 7, **given}


def test_a_saved_conversation_is_gone_on_with_from_the_command_line(server, tmp_path):
    with Client(server.address) as client:
        Conversation(client, messages=[("user", "a"), ("assistant", "b")], top_k=7).save(tmp_path / "chat.json")
    arguments = ["chat", "--json", "--load", str(tmp_path / "chat.json"), "--temperature", "0"]
    result = CliRunner().invoke(app, [*arguments, "--address", server.address], input="Why?\n")
    assert json.loads(result.stdout)["choices"][0]["text"] == "answer *0*"
    request = server.requests[0]
    assert [message.content for message in request.conversation.messages] == ["a", "b", "Why?"]
    assert (request.sampling.top_k, request.sampling.temperature) == (7, 0)
    (tmp_path / "chat.json").write_text("{}")
    assert CliRunner().invoke(app, [*arguments, "--address", server.address], input="Why?\n").exit_code == 2


# ---------------------------------------------------------------------------------------------------------- Markdown


MARKDOWN = st.lists(
    st.sampled_from(
        ["a", "\n", "\n\n", "# T\n", "- x\n", "1. y\n", "```\n", "  z", "`", "~~~\n", " ", "\r\n", "\xa0", "\f"]
    )
)


@given(MARKDOWN)
def test_nothing_is_lost_and_what_is_settled_stays_settled(pieces):
    text = rest = settled = ""
    for piece in pieces:
        text += piece
        newly, rest = split_settled(rest + piece)
        settled += newly
        assert settled + rest == text


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("one\n\ntwo", "one\n\n"),
        ("one\n\n", ""),
        ("- a\n\n- b", ""),
        ("- a\n\n  more of a", ""),
        ("- a\n\nend", "- a\n\n"),
        ("```\na\n\nb\n```\n\nend", "```\na\n\nb\n```\n\n"),
        ("~~~\n```\n\nb", ""),
        ("one\r\n\r\ntwo", "one\r\n\r\n"),
        ("one\n\n\xa0\n\f\r\ntwo", "one\n\n\xa0\n\f\r\n"),
    ],
)
def test_blocks_are_settled_once_nothing_can_change_them(text, settled):
    assert split_settled(text)[0] == settled


def test_an_answer_is_on_the_screen_whole_and_once_however_it_came():
    console = Console(file=io.StringIO(), width=40, force_terminal=False)
    text = "# Owls\n\nThey *see* at night.\n\n- mice\n- voles\n\nEnd"
    with MarkdownStream(console) as screen:
        for character in text:
            screen.write(character)
    shown = console.file.getvalue()
    assert [shown.count(word) for word in ("Owls", "They see at night.", "mice", "voles", "End")] == [1] * 5
