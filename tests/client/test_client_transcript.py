"""Conversations as OASST text and back, exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oasst.prompt import ControlToken, Speaker, Turn, format_prompt
from oasst_client import Message, Role, parse_transcript, render_transcript

CONTROL = [token.value for token in ControlToken]
CONTENTS = st.text(max_size=20).filter(lambda text: not any(each in text for each in CONTROL))
TURNS = st.lists(st.builds(Message, st.sampled_from([Role.USER, Role.ASSISTANT]), CONTENTS), max_size=6)
SYSTEMS = st.lists(st.builds(Message, st.just(Role.SYSTEM), CONTENTS.filter(bool)), max_size=1)


@given(SYSTEMS, TURNS)
def test_messages_come_back_as_they_were(system, turns):
    messages = tuple(system + turns)
    assert parse_transcript(render_transcript(messages)) == messages


@given(st.lists(st.one_of(st.sampled_from(CONTROL), st.sampled_from(["Hi", " ", "\n", "<|", "é"])), max_size=12))
def test_a_text_that_parses_renders_as_itself(pieces):
    text = "".join(pieces)
    try:
        messages = parse_transcript(text)
    except ValueError:
        return
    assert render_transcript(messages) == text


def test_the_text_is_the_prompt_format_without_the_next_turn():
    turns = [Turn(Speaker.PROMPTER, "Q1"), Turn(Speaker.ASSISTANT, "A1"), Turn(Speaker.PROMPTER, "Q2")]
    prompt = [part if isinstance(part, str) else part.value for part in format_prompt(turns, system="Be brief.")]
    messages = [("system", "Be brief."), ("prompter", "Q1"), ("assistant", "A1"), ("user", "Q2")]
    assert render_transcript(messages) + ControlToken.ASSISTANT.value == "".join(prompt)


@pytest.mark.parametrize("token", CONTROL)
def test_words_that_would_become_a_turn_are_refused(token):
    with pytest.raises(ValueError, match=r"message 1 spells out the control token"):
        render_transcript([("user", "Hi"), ("assistant", f"a{token}b")])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<|prompter|>Hi", "character 0 does not end with"),
        ("<|prompter|>Hi<|assistant|>", "character 0 does not end with"),
        ("<|prompter|>Hi<|endoftext|>so", "must begin with .* at character 27"),
        ("Be brief.<|endoftext|>", "must begin with .* at character 9"),
    ],
)
def test_a_text_that_is_not_whole_turns_is_refused_with_the_place(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_transcript(text)


@pytest.mark.parametrize("messages", [[("user", "Hi"), ("system", "Be brief.")], [("system", "")]])
def test_a_system_message_stands_first_and_says_something(messages):
    with pytest.raises(ValueError, match="system message"):
        render_transcript(messages)
