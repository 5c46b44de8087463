"""The dialogues that the demo model learns."""

import json
import unicodedata
from collections import Counter

import pytest
from oasst.prompt import ControlToken, Speaker, Turn
from oasst_training.dialogues import Dialogue, format_dialogue, load_dialogues
from oasst_training.errors import DataError
from oasst_training.tokenizer import encode_parts


def texts_of(dialogue: Dialogue) -> list[str]:
    return [*dialogue.wordings, *(turn.text for turn in dialogue.turns)]


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def message(role, content="text"):
    return {"role": role, "content": content}


def test_there_are_about_a_hundred_and_many_have_several_exchanges(dialogues):
    assert len(dialogues) >= 100
    assert sum(len(dialogue.turns) > 2 for dialogue in dialogues) >= 15


def test_no_two_first_questions_are_the_same_in_any_wording(dialogues):
    counts = Counter(question for dialogue in dialogues for question in dialogue.questions)
    assert [question for question, count in counts.items() if count > 1] == []


def test_texts_are_clean(dialogues):
    for text in (text for dialogue in dialogues for text in texts_of(dialogue)):
        assert text
        assert text == text.strip()
        assert unicodedata.is_normalized("NFC", text)
        assert not any(token.value in text for token in ControlToken)


def test_replies_are_short_but_some_are_long_enough_to_watch_them_stream(dialogues, tokenizer):
    replies = [turn.text for dialogue in dialogues for turn in dialogue.turns[1::2]]
    lengths = sorted(len(tokenizer.encode(reply).ids) for reply in replies)
    assert lengths[len(lengths) // 2] < 60
    assert sum(length >= 150 for length in lengths) >= 5
    assert lengths[-1] <= 260


def test_the_meme_dialogue_asks_who_coined_the_word(dialogues):
    dialogue = next(each for each in dialogues if each.question == "What is a meme?")
    assert dialogue.turns[2].text == "And who coined the word?"
    assert "Richard Dawkins" in dialogue.turns[3].text


def test_a_dialogue_is_formatted_as_the_model_was_trained():
    turns = (Turn(Speaker.PROMPTER, "Hi"), Turn(Speaker.ASSISTANT, "Yes"))
    assert format_dialogue(turns) == [
        ControlToken.PROMPTER,
        "Hi",
        ControlToken.END_OF_TEXT,
        ControlToken.ASSISTANT,
        "Yes",
        ControlToken.END_OF_TEXT,
    ]


def test_every_dialogue_fits_a_position_window_many_times_over(dialogues, tokenizer):
    assert max(len(encode_parts(tokenizer, format_dialogue(dialogue.turns))) for dialogue in dialogues) < 300


def test_renditions_reword_the_first_question_only():
    question, reply = Turn(Speaker.PROMPTER, "Hi"), Turn(Speaker.ASSISTANT, "Yes")
    dialogue = Dialogue((question, reply), wordings=("Hello",))
    assert list(dialogue.renditions()) == [(question, reply), (Turn(Speaker.PROMPTER, "Hello"), reply)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [message("prompter")]},
        {"messages": [message("assistant"), message("assistant")]},
        {"messages": [message("prompter"), message("prompter")]},
        {"messages": [message("prompter"), message("assistant"), message("prompter")]},
        {"messages": [message("prompter"), message("robot")]},
        {"messages": [{"role": "prompter"}, message("assistant")]},
        {"messages": []},
        {},
        [],
    ],
)
def test_a_line_that_is_no_dialogue_is_named(tmp_path, row):
    good = {"messages": [message("prompter"), message("assistant")]}
    path = write_lines(tmp_path / "dialogues.jsonl", good, row)
    with pytest.raises(match=r"dialogues\.jsonl:2: "):
        load_dialogues(path)


def test_a_text_may_hold_any_character_and_blank_lines_are_passed_over(tmp_path):
    row = {"messages": [message("prompter", "one\u2028two"), message("assistant")]}
    path = tmp_path / "dialogues.jsonl"
    path.write_text(f"{json.dumps(row, ensure_ascii=False)}\n\nno\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"dialogues\.jsonl:3: "):
        load_dialogues(path)
    path.write_text(f"\n{json.dumps(row, ensure_ascii=False)}\n  \n", encoding="utf-8")
    assert [dialogue.question for dialogue in load_dialogues(path)] == ["one\u2028two"]
