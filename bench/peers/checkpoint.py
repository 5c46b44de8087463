"""The checkpoint all systems read: random weights, completed with what converters of today ask for."""

import json
from pathlib import Path
from typing import Any

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
        rope = json.loads((path / "config.json").read_text())["rope_parameters"]
        # Names of transformers 4, which the peers' converters read.
        before = {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
        _change(path / "config.json", before)
        _word_for_each_id().save_pretrained(path)
        _change(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        (path / _COMPLETE).touch()
    return path


def _change(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings, indent=2) + "\n")


def _word_for_each_id() -> PreTrainedTokenizerFast:
    """CTranslate2 takes tokens by name, so that each needs one. Only ids are asked for here; no text is read."""
    tokenizer = Tokenizer(WordLevel({str(token_id): token_id for token_id in range(VOCAB_SIZE)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", bos_token="0", eos_token="0")
