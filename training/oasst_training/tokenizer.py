"""Tokenizers of the GPT-NeoX kind: a small one made anew or a checkpoint's own, their control tokens, their files."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from oasst.prompt import ControlToken, Part
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

__all__ = ["add_control_tokens", "control_id", "encode_parts", "load_tokenizer", "make_tokenizer", "save_tokenizer"]

# Ids 0 and 1, as in every GPT-NeoX tokenizer.
_BASE_TOKENS = (ControlToken.END_OF_TEXT, ControlToken.PADDING)

# These follow the learned tokens. Open-Assistant took their order from a set, so it differs between its checkpoints;
# this is the one a published sibling got.
_ADDED_TOKENS = (
    ControlToken.PREFIX_END,
    ControlToken.PREFIX_BEGIN,
    ControlToken.SYSTEM,
    ControlToken.ASSISTANT,
    ControlToken.PROMPTER,
)

# What the original's tokenizer_config.json says: no limit of its own.
_NO_LENGTH_LIMIT = 10**30


def make_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE learned from `texts`, with at most `vocab_size` tokens, control tokens included.

    Control tokens spelled out in a text are encoded as text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_ADDED_TOKENS),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[token.value for token in _BASE_TOKENS],
    )
    tokenizer.train_from_iterator(texts, trainer)
    add_control_tokens(tokenizer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint. Control tokens spelled out in a text are encoded as text."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def add_control_tokens(tokenizer: Tokenizer) -> None:
    """The tokenizer has every token of the prompt format, all marked special. Those that it had keep their ids."""
    tokenizer.add_special_tokens([AddedToken(token.value, normalized=False) for token in _ADDED_TOKENS])


def control_id(tokenizer: Tokenizer, token: ControlToken) -> int:
    """The id that this tokenizer gives to a control token.

    Raises:
        ValueError: if it has none.
    """
    token_id = tokenizer.token_to_id(token.value)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {token.value}")
    return token_id


def encode_parts(tokenizer: Tokenizer, parts: Sequence[Part]) -> list[int]:
    """The token ids of a prompt: control tokens by id, text as text whatever it spells out."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, ControlToken):
            ids.append(control_id(tokenizer, part))
        else:
            ids += tokenizer.encode(part, add_special_tokens=False).ids
    return ids


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, as the original checkpoint has them."""
    end_of_text = ControlToken.END_OF_TEXT.value
    special_tokens = {
        "additional_special_tokens": [token.value for token in _ADDED_TOKENS],
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "pad_token": ControlToken.PADDING.value,
        "unk_token": end_of_text,
    }
    config = {
        **special_tokens,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LENGTH_LIMIT,
        "tokenizer_class": "GPTNeoXTokenizer",
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", special_tokens)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
