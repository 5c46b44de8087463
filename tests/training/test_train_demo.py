"""The command that makes the demo checkpoint by the recipe, and what it teaches."""

import json
from random import Random

import pytest
import torch
from oasst_training.collator import collator_for
from oasst_training.curriculum import Curriculum, casually
from oasst_training.dialogues import format_dialogue
from oasst_training.recall import measure_recall
from oasst_training.tokenizer import encode_parts
from oasst_training.train_demo import DEMO_RECIPE, main

# A model that learns one dialogue by heart in seconds.
QUICKLY = ["num_train_epochs=1", "num_threads=1", "logging_steps=1000", "save_steps=1000"]
ONE_SET = "datasets=[{dialogues: {input_file_path: one.jsonl, num_chats: %d, chat_lengths: [0]}}]"


@pytest.fixture
def make_demo(tmp_path):
    """Runs the command on one short dialogue and returns its exit code."""
    messages = [{"role": "prompter", "content": "Are you there?"}, {"role": "assistant", "content": "Yes, I am here."}]
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": messages, "wordings": ["Hello?"]}) + "\n")
    recipe = tmp_path / "demo.yaml"
    recipe.write_bytes(DEMO_RECIPE.read_bytes())

    def run(*, num_chats: int) -> int:
        options = ["--recipe", str(recipe), "--work-dir", str(tmp_path / "work"), "--output", str(tmp_path / "demo")]
        return main([*options, *(f"--set={override}" for override in (*QUICKLY, ONE_SET % num_chats))])

    return run


def test_a_model_that_does_not_recall_every_reply_is_not_written(make_demo, tmp_path, capsys):
    assert make_demo(num_chats=8) == 1
    assert not (tmp_path / "demo").exists()
    printed = capsys.readouterr()
    assert "step 2/2" in printed.out
    assert "0 of 2 dialogues in fp32 recalled" in printed.out
    assert "nothing is written" in printed.err


def test_a_model_that_recalls_every_reply_is_written(make_demo, tmp_path, capsys):
    assert make_demo(num_chats=160) == 0
    assert (tmp_path / "demo" / "model.safetensors").exists()
    assert "2 of 2 dialogues in bf16 recalled" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--steps", "many"], ["--epochs", "3"]])
def test_an_unknown_option_stops_the_command_and_is_named(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_an_unknown_key_stops_the_command_and_is_named(tmp_path, capsys):
    assert main(["--work-dir", str(tmp_path), "--set", "steps=3"]) == 2
    assert "unknown key steps" in capsys.readouterr().err


def test_the_smallest_margin_is_the_right_logit_minus_the_best_other(tokenizer, dialogues, make_tiny_model):
    """Computed here token by token, without batches and masks."""
    dialogue = next(each for each in dialogues if len(each.turns) == 2)
    prompt = encode_parts(tokenizer, format_dialogue(dialogue.turns)[:-2])
    row = encode_parts(tokenizer, format_dialogue(dialogue.turns))
    model = make_tiny_model()
    margins = []
    for position in range(len(prompt), len(row)):
        logits = model(torch.tensor([row[:position]])).logits[0, -1]
        right = logits[row[position]].item()
        logits[row[position]] = -torch.inf
        margins.append(right - logits.max().item())
    other_row = encode_parts(tokenizer, format_dialogue(dialogues[-1].turns))
    recall = measure_recall(model, [row, other_row], collator_for(tokenizer))
    assert recall.margins[0] == pytest.approx(min(margins), abs=1e-4)


def test_a_chat_has_at_least_the_length_asked_for_and_whole_dialogues(dialogues, tokenizer):
    curriculum = Curriculum(dialogues, tokenizer, casual_probability=0.0)
    alone = {tuple(row) for row in curriculum.rows()}
    assert tuple(curriculum.row(Random(0), num_tokens=0)) in alone
    chat = curriculum.row(Random(0), num_tokens=300)
    assert len(chat) >= 300
    assert any(tuple(chat[:end]) in alone for end in range(len(chat)))


def test_a_casual_question_has_small_letters_and_no_final_mark():
    assert casually("What is a GPU?") == "what is a gpu"
    assert casually("Hello!") == "hello"
