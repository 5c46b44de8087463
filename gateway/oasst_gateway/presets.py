"""From what a request leaves open to concrete sampling values: its own fields, then its preset's, then "off"."""

from collections.abc import Mapping
from types import MappingProxyType

from oasst.presets import PRESETS
from oasst.v1 import generation_pb2

__all__ = ["preset_max_new_tokens", "preset_params", "resolve_sampling"]

# Field of SamplingParams -> the value that does nothing.
_OFF: Mapping[str, float] = MappingProxyType(
    {
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
    }
)


def preset_params(name: str) -> generation_pb2.SamplingParams:
    """The preset `name` with every value set."""
    return _with_values(generation_pb2.SamplingParams(preset=name))


def preset_max_new_tokens(name: str) -> int | None:
    """The most tokens the preset `name` generates; None without a preset."""
    return int(PRESETS[name]["max_new_tokens"]) if name else None


def resolve_sampling(requested: generation_pb2.SamplingParams, *, seed: int) -> generation_pb2.SamplingParams:
    """`requested` with every value set; `seed` is used if it has none of its own."""
    resolved = _with_values(requested)
    if not resolved.HasField("seed"):
        resolved.seed = seed
    return resolved


def _with_values(requested: generation_pb2.SamplingParams) -> generation_pb2.SamplingParams:
    preset = PRESETS[requested.preset] if requested.preset else {}
    resolved = generation_pb2.SamplingParams()
    resolved.CopyFrom(requested)
    for field, off in _OFF.items():
        if not resolved.HasField(field):
            setattr(resolved, field, preset.get(field, off))
    return resolved
