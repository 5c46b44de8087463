"""The demo checkpoint's tokenizer."""

import pytest
from oasst.prompt import ControlToken
from oasst_training.dialogues import format_dialogue
from oasst_training.tokenizer import control_id, encode_parts, load_tokenizer, save_tokenizer
from oasst_training.train_demo import make_demo_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, directory)
    return directory


def test_it_gives_every_text_back(tokenizer, dialogues):
    for dialogue in dialogues:
        for text in (*dialogue.wordings, *(turn.text for turn in dialogue.turns)):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("text", ["", " two  spaces ", "tab\tand\nline", "日本語, עברית, 🦔🏳️‍🌈", "\x00\x7f"])
def test_it_gives_back_what_it_never_saw(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_some_characters_of_the_replies_take_several_tokens(tokenizer, dialogues):
    replies = (turn.text for dialogue in dialogues for turn in dialogue.turns[1::2])
    tokens = [token_id for reply in replies for token_id in tokenizer.encode(reply).ids]
    assert any("\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token_id]) for token_id in tokens)


def test_control_ids_are_where_a_gpt_neox_tokenizer_has_them(tokenizer):
    assert control_id(tokenizer, ControlToken.END_OF_TEXT) == 0
    assert control_id(tokenizer, ControlToken.PADDING) == 1
    added = [token for token in ControlToken if control_id(tokenizer, token) > 1]
    ids = [control_id(tokenizer, token) for token in added]
    assert sorted(ids) == list(range(tokenizer.get_vocab_size() - 5, tokenizer.get_vocab_size()))
    assert ids != sorted(ids), "their order must not be the enum's, so that no code can rely on it"


def test_a_missing_control_token_is_named():
    with pytest.raises(ValueError, match="prompter"):
        control_id(Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {}, "merges": []}}'), ControlToken.PROMPTER)


@pytest.mark.parametrize("token", ControlToken)
def test_a_control_token_spelled_out_stays_text(tokenizer, token):
    text = f"Hi{token.value}there"
    ids = encode_parts(tokenizer, [text])
    assert control_id(tokenizer, token) not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_parts_give_the_ids_of_the_whole_text_with_control_tokens_on(saved, tokenizer, dialogues):
    whole = Tokenizer.from_file(str(saved / "tokenizer.json"))
    for dialogue in dialogues:
        parts = format_dialogue(dialogue.turns)
        text = "".join(part.value if isinstance(part, ControlToken) else part for part in parts)
        assert encode_parts(tokenizer, parts) == whole.encode(text).ids


def test_transformers_reads_the_files_alike(saved, tokenizer, dialogues):
    theirs = AutoTokenizer.from_pretrained(saved)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 1)
    assert len(theirs) == tokenizer.get_vocab_size()
    for dialogue in dialogues:
        text = dialogue.turns[-1].text
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids


def test_a_saved_tokenizer_is_loaded_as_it_was(saved, tokenizer):
    loaded = load_tokenizer(saved)
    assert loaded.to_str() == tokenizer.to_str()
    assert loaded.encode("<|assistant|>").ids == tokenizer.encode("<|assistant|>").ids


def test_the_same_dialogues_give_the_same_tokenizer(tokenizer, dialogues):
    assert make_demo_tokenizer(dialogues).to_str() == tokenizer.to_str()
