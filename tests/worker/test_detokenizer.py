"""Text is a function of the token ids: whole, never early, the same after a resume."""

import itertools
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import oasst_training
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oasst_worker.detokenizer import ChoiceText, Detokenizer, StopMatcher, UnsupportedTokenizerError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "Hello, what is a meme? A meme is an idea that spreads.",
    "Zürich, naïve façade, smörgåsbord",
    "日本語のテキスト 中文 한국어",
    "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "    indented\n\tcode()\n",
]


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE as GPT-NeoX checkpoints have: special tokens first, added runs of spaces last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("  ", normalized=True), AddedToken("   ", normalized=True), AddedToken("é ü")])
    tokenizer.add_special_tokens(["<|prompter|>", "<|assistant|>"])
    return tokenizer


@cache
def detokenizer() -> Detokenizer:
    return Detokenizer(tokenizer())


@cache
def demo_tokenizer() -> tuple[Tokenizer, Detokenizer]:
    demo = Tokenizer.from_file(str(Path(oasst_training.__file__).parent / "demo" / "tokenizer.json"))
    return demo, Detokenizer(demo)


def byte_tokens(data: bytes) -> list[int]:
    """One token per byte, so that characters are cut wherever they can be."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(character for character in alphabet if ord(character) > 255))
    character_of = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
    return [tokenizer().token_to_id(character_of[byte]) for byte in data]


def pieces_of(ids: Iterable[int]) -> list[str]:
    state = detokenizer().start()
    return [state.add(token_id) for token_id in ids] + [state.finish()]


def show(text: ChoiceText, ids: Sequence[int]) -> str:
    """What a caller sees of these tokens before the choice is finished."""
    return "".join(text.add(token_id) for token_id in ids)


def choice_text(stops: Sequence[str] = (), *, min_new_tokens: int = 0) -> ChoiceText:
    return ChoiceText(detokenizer().start(), stops, min_new_tokens=min_new_tokens)


any_ids = st.lists(st.integers(0, 430), max_size=40)
any_stops = st.lists(st.text(alphabet="ab \n é🙂", min_size=1, max_size=5), max_size=4)


@settings(max_examples=400, deadline=None)
@given(any_ids)
def test_pieces_concatenate_to_what_the_tokenizer_decodes(ids: list[int]) -> None:
    assert "".join(pieces_of(ids)) == tokenizer().decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2100), max_size=40))
def test_pieces_of_the_demo_checkpoint_s_tokens_concatenate_as_well(ids: list[int]) -> None:
    demo, demo_detokenizer = demo_tokenizer()
    state = demo_detokenizer.start()
    pieces = [state.add(token_id) for token_id in ids] + [state.finish()]
    assert "".join(pieces) == demo.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=24))
def test_any_bytes_whatsoever_come_out_as_the_tokenizer_decodes_them(data: bytes) -> None:
    ids = byte_tokens(data)
    assert "".join(pieces_of(ids)) == tokenizer().decode(ids, skip_special_tokens=True)


@given(st.text(max_size=20))
def test_no_piece_of_an_honest_text_holds_half_a_character(text: str) -> None:
    honest = text.replace("\ufffd", "")
    pieces = pieces_of(byte_tokens(honest.encode()))
    assert "".join(pieces) == honest
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces_of(byte_tokens("a🙂".encode())) == ["a", "", "", "", "🙂", ""]


def test_a_replacement_character_in_the_text_is_text() -> None:
    assert pieces_of(byte_tokens("\ufffd".encode())) == ["", "", "\ufffd", ""]


def test_bytes_that_can_never_become_a_character_come_out_before_the_end() -> None:
    assert pieces_of(byte_tokens(b"\xff\xf0\x9fa")) == ["\ufffd", "", "", "\ufffda", ""]


def test_a_character_left_incomplete_comes_out_at_the_end() -> None:
    assert pieces_of(byte_tokens(b"a\xf0\x9f")) == ["a", "", "", "\ufffd"]


def test_special_tokens_give_no_text() -> None:
    ids = tokenizer().encode("Hello<|endoftext|><|prompter|>").ids
    assert "".join(pieces_of(ids)) == "Hello"


def test_a_tokenizer_whose_tokens_are_not_bytes_is_refused_by_name() -> None:
    words = Tokenizer(models.WordLevel({"hello": 0}, unk_token="hello"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedTokenizerError, match="WordPiece, not ByteLevel"):
        Detokenizer(words)


def first_stop_by_definition(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text up to the stop text that is complete first, found by looking at every prefix."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.data())
def test_the_first_complete_stop_text_wins_however_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    matcher = StopMatcher(stops)
    bounds = [0, *cuts, len(text)]
    shown = "".join(matcher.add(text[start:end]) for start, end in itertools.pairwise(bounds))
    assert (shown + matcher.finish(), matcher.matched) == first_stop_by_definition(text, stops)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_exactly_the_longest_suffix_that_may_become_a_stop_text_is_held(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.add(character) for character in text)
    if matcher.matched is None:
        may_become_a_stop = [
            length
            for length in range(len(text) + 1)
            if any(len(stop) > length and stop.startswith(text[len(text) - length :]) for stop in stops)
        ]
        assert len(text) - len(shown) == max(may_become_a_stop)


def test_nothing_follows_a_matched_stop_text() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.add("one EN"), matcher.add("D two"), matcher.add("three"), matcher.finish()] == ["one ", "", "", ""]
    assert matcher.matched == "END"


def test_a_stop_text_is_found_across_tokens_and_characters() -> None:
    text = choice_text(["🙂!"])
    assert show(text, byte_tokens("so 🙂! no".encode())) == "so "
    assert text.stop == "🙂!"


def test_a_stop_text_inside_the_minimum_is_text_and_the_next_one_ends_it() -> None:
    ids = byte_tokens(b"a.b.c")
    text = choice_text(["."], min_new_tokens=2)
    assert show(text, ids) == "a.b"
    assert text.stop == "."


def test_text_held_for_a_stop_that_does_not_come_is_given_at_the_end() -> None:
    text = choice_text(["###"])
    assert show(text, byte_tokens(b"a##")) == "a"
    assert text.finish() == "##"
    assert text.stop is None


@settings(max_examples=300, deadline=None)
@given(any_ids, any_stops, st.integers(0, 6), st.data())
def test_a_resume_at_any_token_goes_on_with_the_undisturbed_text(
    ids: list[int], stops: list[str], min_new_tokens: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(ids)))
    undisturbed = choice_text(stops, min_new_tokens=min_new_tokens)
    expected = show(undisturbed, ids) + undisturbed.finish()

    logged = show(choice_text(stops, min_new_tokens=min_new_tokens), ids[:cut])
    resumed = choice_text(stops, min_new_tokens=min_new_tokens)
    show(resumed, ids[:cut])  # The replay: its text is in the log already.

    assert logged + show(resumed, ids[cut:]) + resumed.finish() == expected
    assert resumed.stop == undisturbed.stop
