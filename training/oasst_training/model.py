"""A GPT-NeoX of the original's kind (partial rotary, parallel residual, untied head), of any size."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from oasst.prompt import ControlToken
from tokenizers import Tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from oasst_training.tokenizer import control_id

__all__ = ["ModelShape", "build_model", "export_model"]

# As in the original: the embedding has more rows than the tokenizer has tokens.
_PAD_VOCAB_TO_MULTIPLE_OF = 16


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model. The MLP is four times as wide as the rest."""

    num_layers: int
    hidden_size: int
    num_heads: int
    rotary_fraction: float = 0.25
    max_positions: int = 2048


def build_model(shape: ModelShape, tokenizer: Tokenizer, *, seed: int) -> GPTNeoXForCausalLM:
    """An untrained fp32 model for this tokenizer. The same seed gives the same weights."""
    end_of_text_id = control_id(tokenizer, ControlToken.END_OF_TEXT)
    config = GPTNeoXConfig(
        vocab_size=_padded_vocab_size(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=4 * shape.hidden_size,
        max_position_embeddings=shape.max_positions,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": shape.rotary_fraction,
        },
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
        pad_token_id=control_id(tokenizer, ControlToken.PADDING),
    )
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(config)


def export_model(model: GPTNeoXForCausalLM, directory: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors, the weights in fp16."""
    half = deepcopy(model).half()  # type: ignore[no-untyped-call]  # transformers leaves it untyped.
    half.save_pretrained(directory)


def _padded_vocab_size(tokenizer: Tokenizer) -> int:
    """At least one row more than there are tokens, so that padding rows always exist."""
    return (tokenizer.get_vocab_size() // _PAD_VOCAB_TO_MULTIPLE_OF + 1) * _PAD_VOCAB_TO_MULTIPLE_OF
