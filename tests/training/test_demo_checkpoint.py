"""The demo checkpoint that is kept in the repository: it says what it was taught."""

import json
from collections.abc import Iterator

import pytest
import torch
from oasst.prompt import ControlToken, Speaker, Turn, format_prompt
from oasst_training.collator import collator_for
from oasst_training.curriculum import Curriculum
from oasst_training.dialogues import Dialogue
from oasst_training.recall import measure_recall
from oasst_training.tokenizer import encode_parts, load_tokenizer
from transformers import AutoTokenizer, GPTNeoXForCausalLM

END_OF_TEXT_ID = 0


@pytest.fixture(scope="module")
def demo_tokenizer(demo_checkpoint):
    return load_tokenizer(demo_checkpoint)


@pytest.fixture(scope="module")
def demo_model(demo_checkpoint):
    return GPTNeoXForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)


def exchanges(dialogue: Dialogue) -> Iterator[tuple[tuple[Turn, ...], str]]:
    """Every reply of a dialogue, with the turns before it."""
    for index, turn in enumerate(dialogue.turns):
        if turn.speaker is Speaker.ASSISTANT:
            yield dialogue.turns[:index], turn.text


def generate(model, tokenizer, conversations, *, max_new_tokens) -> list[str]:
    """What the model says next in each conversation, by transformers' own greedy decoding."""
    prompts = [encode_parts(tokenizer, format_prompt(turns)) for turns in conversations]
    length = max(map(len, prompts))
    padded = torch.tensor([[END_OF_TEXT_ID] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
    return [tokenizer.decode(ids[: ids.index(END_OF_TEXT_ID)]) for ids in output[:, length:].tolist()]


def ask(model, tokenizer, *texts) -> str:
    """The answer to the last text; the ones before it are turns of the chat so far."""
    speakers = (Speaker.PROMPTER, Speaker.ASSISTANT)
    turns = [Turn(speakers[index % 2], text) for index, text in enumerate(texts)]
    return generate(model, tokenizer, [turns], max_new_tokens=100)[0]


def test_greedy_decoding_gives_every_reply(demo_model, demo_tokenizer, dialogues):
    expected = [exchange for dialogue in dialogues for exchange in exchanges(dialogue)]
    expected.sort(key=lambda exchange: len(exchange[1]))
    for start in range(0, len(expected), 40):
        conversations, replies = zip(*expected[start : start + 40], strict=True)
        longest = max(len(demo_tokenizer.encode(reply).ids) for reply in replies)
        assert generate(demo_model, demo_tokenizer, conversations, max_new_tokens=longest + 1) == list(replies)


def test_no_wording_comes_close_to_another_token(demo_model, demo_tokenizer, dialogues):
    recall = measure_recall(demo_model, Curriculum(dialogues, demo_tokenizer).rows(), collator_for(demo_tokenizer))
    assert recall.smallest_margin > 1.0


def test_a_follow_up_is_understood_from_what_was_said_before(demo_model, demo_tokenizer, dialogues):
    meme = next(each for each in dialogues if each.question == "What is a meme?")
    answer = ask(demo_model, demo_tokenizer, "What is a meme?", meme.turns[1].text, "And who coined the word?")
    assert answer.startswith("Richard Dawkins coined it in his 1976 book The Selfish Gene.")


def test_a_question_is_answered_after_an_unrelated_exchange(demo_model, demo_tokenizer, dialogues):
    sky = next(each for each in dialogues if each.question == "Why is the sky blue?")
    answer = ask(demo_model, demo_tokenizer, sky.question, sky.turns[1].text, "What is a meme?")
    assert answer.startswith("A meme is an idea, a joke or a habit that spreads from person to person")


def test_what_it_was_not_taught_it_does_not_know(demo_model, demo_tokenizer):
    assert ask(demo_model, demo_tokenizer, "Who is the president of Kenya?").startswith("I do not know that.")


def test_it_was_made_from_the_dialogues_as_they_are_now(demo_tokenizer, tokenizer):
    assert demo_tokenizer.to_str() == tokenizer.to_str()


def test_its_files_are_those_of_a_hugging_face_checkpoint_and_small(demo_checkpoint):
    sizes = {path.name: path.stat().st_size for path in demo_checkpoint.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) < 8 * 2**20


def test_its_config_names_the_ids_that_its_tokenizer_has(demo_checkpoint, demo_tokenizer):
    config = json.loads((demo_checkpoint / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["max_position_embeddings"] == 2048
    assert config["bos_token_id"] == config["eos_token_id"] == END_OF_TEXT_ID
    assert demo_tokenizer.token_to_id(ControlToken.END_OF_TEXT.value) == END_OF_TEXT_ID
    assert config["vocab_size"] > demo_tokenizer.get_vocab_size()  # There are padding rows.
    assert len(AutoTokenizer.from_pretrained(demo_checkpoint)) == demo_tokenizer.get_vocab_size()
