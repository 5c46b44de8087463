"""The shape of a GPT-NeoX checkpoint, read from its `config.json`.

Both styles are read: transformers 4 (`rotary_pct`, `rotary_emb_base`, `torch_dtype`) and transformers 5
(`rope_parameters`, `dtype`). Whatever would change the numbers and is not implemented stops the start here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ["Activation", "CheckpointError", "NeoXConfig", "load_config"]

Activation = Literal["gelu", "gelu_tanh"]

# transformers' name -> the function. The tanh variants differ from each other only in how they are written down.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_KNOWN_ROPE_PARAMETERS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


class CheckpointError(Exception):
    """A checkpoint cannot be served; the message is one sentence that names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeoXConfig:
    """What the forward pass and the loader need to know of a checkpoint."""

    vocab_size: int  # Rows of embedding and head; may exceed the tokenizer's ids by padding rows.
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    rotary_dim: int  # The first dimensions of each head that are rotated; even.
    rotary_base: float
    max_positions: int
    layer_norm_eps: float
    parallel_residual: bool
    tie_word_embeddings: bool
    attention_bias: bool  # Whether qkv and attention output carry biases; the MLP always does.
    hidden_act: Activation
    eos_token_id: int
    bos_token_id: int | None
    pad_token_id: int | None
    dtype: torch.dtype  # What the checkpoint says it was saved in.


def load_config(folder: Path) -> NeoXConfig:
    """Returns the configuration of the checkpoint in `folder`.

    Raises:
        CheckpointError: `config.json` is missing or unreadable, or asks for something that is not implemented.
    """
    fields = _Fields.read(folder / "config.json")
    fields.require("model_type", fields.get("model_type"), ["gpt_neox"])
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "is set, but quantized checkpoints are not supported")

    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    if hidden_size % num_heads:
        raise fields.error("num_attention_heads", f"is {num_heads}, which does not divide hidden_size {hidden_size}")
    head_dim = hidden_size // num_heads
    vocab_size = fields.count("vocab_size")
    rotary_fraction, rotary_base = _rotary(fields)
    rotary_dim = int(head_dim * rotary_fraction)
    if rotary_dim < 2 or rotary_dim % 2:
        raise fields.error(
            "rotary_pct", f"of {rotary_fraction} rotates {rotary_dim} of {head_dim} dimensions, not an even number"
        )
    return NeoXConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=fields.count("intermediate_size"),
        rotary_dim=rotary_dim,
        rotary_base=rotary_base,
        max_positions=fields.count("max_position_embeddings", default=2048),
        layer_norm_eps=fields.number("layer_norm_eps", fields.get("layer_norm_eps", 1e-5)),
        parallel_residual=fields.flag("use_parallel_residual", default=True),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=fields.flag("attention_bias", default=True),
        hidden_act=_ACTIVATIONS[fields.require("hidden_act", fields.get("hidden_act", "gelu"), _ACTIVATIONS)],
        eos_token_id=_eos_token_id(fields, vocab_size),
        bos_token_id=fields.optional_token_id("bos_token_id", vocab_size),
        pad_token_id=fields.optional_token_id("pad_token_id", vocab_size),
        dtype=_dtype(fields),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of one `config.json`; every error names the file and the field."""

    path: Path
    values: dict[str, Any]  # Any: JSON.

    @classmethod
    def read(cls, path: Path) -> "_Fields":
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: holds no JSON object.")
        return cls(path, values)

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} {problem}.")

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def require(self, name: str, value: Any, allowed: Any) -> str:
        """Returns `value` if it is one of the `allowed` names."""
        if not isinstance(value, str) or value not in allowed:
            raise self.error(name, f"is {value!r}, but only {', '.join(sorted(allowed))} can be served")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if value is None:
            raise self.error(name, "is missing")
        if type(value) is not int or value < 1:
            raise self.error(name, f"is {value!r}, not a positive integer")
        return value

    def number(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.error(name, f"is {value!r}, not a positive number")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"is {value!r}, neither true nor false")
        return value

    def optional_token_id(self, name: str, vocab_size: int) -> int | None:
        value = self.get(name)
        return None if value is None else self.token_id(name, value, vocab_size)

    def token_id(self, name: str, value: Any, vocab_size: int) -> int:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise self.error(name, f"is {value!r}, not a token id below vocab_size {vocab_size}")
        return value


def _rotary(fields: _Fields) -> tuple[float, float]:
    """Returns the rotated fraction of a head and the base of the frequencies."""
    if fields.get("rope_scaling") is not None:
        raise fields.error("rope_scaling", "is set, but scaled rotary embeddings are not supported")
    rope = fields.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise fields.error("rope_parameters", f"is {rope!r}, not an object")
    if unknown := sorted(rope.keys() - _KNOWN_ROPE_PARAMETERS):
        raise fields.error("rope_parameters", f"holds {', '.join(unknown)}, which is not supported")
    fields.require("rope_parameters.rope_type", rope.get("rope_type", rope.get("type", "default")), ["default"])
    fraction = fields.number("rotary_pct", rope.get("partial_rotary_factor", fields.get("rotary_pct", 0.25)))
    if fraction > 1:
        raise fields.error("rotary_pct", f"is {fraction}, more than 1")
    base = fields.number("rotary_emb_base", rope.get("rope_theta", fields.get("rotary_emb_base", 10000.0)))
    return fraction, base


def _eos_token_id(fields: _Fields, vocab_size: int) -> int:
    # transformers' own default, 2, is wrong for every published GPT-NeoX: better to ask for it.
    value = fields.get("eos_token_id")
    if value is None:
        raise fields.error("eos_token_id", "is missing")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return fields.token_id("eos_token_id", value, vocab_size)


def _dtype(fields: _Fields) -> torch.dtype:
    name = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return _DTYPES[fields.require("dtype", name, _DTYPES)]
