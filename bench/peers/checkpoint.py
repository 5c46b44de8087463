"""The checkpoint all systems read: random weights, completed with what converters of today ask for."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from bench.checkpoints import VOCAB_SIZE, random_checkpoint

__all__ = ["peers_checkpoint"]

_COMPLETE = "complete"  # A file in the folder: it was made to the end.


def peers_checkpoint(shape: str, folder: Path) -> Path:
    """A checkpoint of this shape in `folder`, made once."""
    path = folder / shape
    if not (path / _COMPLETE).exists():
        random_checkpoint(shape, folder)
        _name_settings_as_before(path / "config.json")
        _word_for_each_id().save_pretrained(path)
        (path / _COMPLETE).touch()
    return path


def _name_settings_as_before(config_file: Path) -> None:
    """The rotary settings also by their names of transformers 4, which the peers' converters read."""
    config = json.loads(config_file.read_text())
    rope = config["rope_parameters"]
    config |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _word_for_each_id() -> PreTrainedTokenizerFast:
    """CTranslate2 takes tokens by name, so that each needs one. Only ids are asked for here; no text is read."""
    tokenizer = Tokenizer(WordLevel({str(token_id): token_id for token_id in range(VOCAB_SIZE)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", bos_token="0", eos_token="0")
