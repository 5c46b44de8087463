"""Finds a GPT-NeoX checkpoint and loads its weights, checked name by name and shape by shape.

Reads single or sharded safetensors, else single or sharded `pytorch_model.bin` (tensors only: pickled code is
refused). Shards are read one after the other and tensors are copied out one by one, so that memory holds the result
and at most one shard. A rank of several reads only its share of each matrix.
"""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oasst_worker.model.config import CheckpointError, NeoXConfig
from oasst_worker.model.ranks import Share

__all__ = ["CheckpointError", "LayerWeights", "NeoXWeights", "deinterleave_qkv", "load_weights", "resolve_checkpoint"]

_logger = logging.getLogger(__name__)

_SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"

# What a server needs of a hub repository; never code.
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
]
_WEIGHT_FILES = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)

_EMBEDDING = "gpt_neox.embed_in.weight"
_HEAD = "embed_out.weight"
_HEAD_ALIAS = "lm_head.weight"  # The name in memory; some tools write it to disk.

# Constants that checkpoints of older transformers carry; they follow from the configuration.
_IGNORED = re.compile(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|^gpt_neox\.rotary_emb\.inv_freq$")

# Field of LayerWeights -> name of the tensor within its layer.
_LAYER_TENSORS = {
    "norm1_weight": "input_layernorm.weight",
    "norm1_bias": "input_layernorm.bias",
    "norm2_weight": "post_attention_layernorm.weight",
    "norm2_bias": "post_attention_layernorm.bias",
    "qkv_weight": "attention.query_key_value.weight",
    "qkv_bias": "attention.query_key_value.bias",
    "dense_weight": "attention.dense.weight",
    "dense_bias": "attention.dense.bias",
    "mlp_in_weight": "mlp.dense_h_to_4h.weight",
    "mlp_in_bias": "mlp.dense_h_to_4h.bias",
    "mlp_out_weight": "mlp.dense_4h_to_h.weight",
    "mlp_out_bias": "mlp.dense_4h_to_h.bias",
}

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block, or a rank's share of it. Matrices are [out, in], as `torch.nn.functional.linear` takes them."""

    norm1_weight: Tensor  # [hidden], before attention
    norm1_bias: Tensor
    norm2_weight: Tensor  # [hidden], before the MLP
    norm2_bias: Tensor
    qkv_weight: Tensor  # [3 * hidden, hidden]: all q rows, all k rows, all v rows, heads in order within each
    qkv_bias: Tensor | None  # [3 * hidden], in the same order; None without attention biases
    dense_weight: Tensor  # [hidden, hidden], the attention's output
    dense_bias: Tensor | None
    mlp_in_weight: Tensor  # [intermediate, hidden]
    mlp_in_bias: Tensor
    mlp_out_weight: Tensor  # [hidden, intermediate]
    mlp_out_bias: Tensor | None  # None, as dense_bias, in every share but the first


@dataclass(frozen=True, slots=True)
class NeoXWeights:
    """All tensors of a checkpoint, on one device and in one dtype."""

    embed_in: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm_weight: Tensor  # [hidden]
    final_norm_bias: Tensor
    head: Tensor  # [vocab, hidden]; the same tensor as embed_in where the checkpoint ties them


def resolve_checkpoint(model: str, revision: str | None = None) -> Path:
    """Returns the local folder of `model`: a folder as it is, a hub id after fetching what is not yet cached.

    Raises:
        CheckpointError: There is no such folder, or the hub cannot give the repository.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model}: is a file; a checkpoint is a folder.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise CheckpointError(f"{model}: no such folder.")
    for weight_files in _WEIGHT_FILES:
        try:
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*_SMALL_FILES, *weight_files]))
        # The hub's client raises its own errors, its HTTP library's and the system's; which ones changes by version.
        except Exception as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise CheckpointError(
                f"{model}: is no local folder and could not be fetched from the hub: {reason}."
            ) from error
        if any(folder.glob(weight_files[0])):
            break
    return folder


def load_weights(
    folder: Path,
    config: NeoXConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    share: Share = Share(),  # noqa: B008  # Frozen.
) -> NeoXWeights:
    """Returns the weights of the checkpoint in `folder`, converted to `dtype` on `device`; only those of `share`.

    The tensors own their memory: the files may go away afterwards.

    Raises:
        CheckpointError: A file is missing, truncated or corrupt, or the tensors are not those `config` asks for.
    """
    shapes = _tensor_shapes(config)
    num_heads = share.of_config(config).num_heads
    shards = _find_shards(folder)
    tensors: dict[str, Tensor] = {}
    for number, shard in enumerate(shards, start=1):
        for stored_name, stored in _read_shard(shard):
            if _IGNORED.search(stored_name):
                continue
            name = _HEAD if stored_name == _HEAD_ALIAS else stored_name
            _check_shape(shard, stored_name, stored.shape, shapes.get(name))
            if name in tensors:
                raise CheckpointError(f"{shard}: holds {stored_name}, which was already loaded.")
            tensor = stored.read(_cut(name, stored.shape, share))
            _check_type(shard, stored_name, tensor)
            if ".attention.query_key_value." in name:
                tensor = deinterleave_qkv(tensor, num_heads)
            tensors[name] = tensor.to(device=device, dtype=dtype, copy=True)
        _logger.info("loaded %s (%d of %d)", shard.name, number, len(shards))
    if missing := sorted(shapes.keys() - tensors.keys() - ({_HEAD} if config.tie_word_embeddings else set())):
        raise CheckpointError(f"{folder}: the checkpoint lacks {_some(missing)}.")
    return _assemble(tensors, config, share)


def deinterleave_qkv(rows: Tensor, num_heads: int) -> Tensor:
    """Returns a query-key-value weight or bias with all q rows first, then all k rows, then all v rows.

    On disk the rows lie head by head, each head's q, k and v together: [heads, 3, head_dim, ...].
    """
    by_head = rows.view(num_heads, 3, -1, *rows.shape[1:])
    return by_head.transpose(0, 1).reshape(rows.shape)


def _tensor_shapes(config: NeoXConfig) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor of such a checkpoint, the head included."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "norm1_weight": (hidden,),
        "norm1_bias": (hidden,),
        "norm2_weight": (hidden,),
        "norm2_bias": (hidden,),
        "qkv_weight": (3 * hidden, hidden),
        "dense_weight": (hidden, hidden),
        "mlp_in_weight": (intermediate, hidden),
        "mlp_in_bias": (intermediate,),
        "mlp_out_weight": (hidden, intermediate),
        "mlp_out_bias": (hidden,),
    }
    if config.attention_bias:
        layer |= {"qkv_bias": (3 * hidden,), "dense_bias": (hidden,)}
    return {
        _EMBEDDING: (config.vocab_size, hidden),
        "gpt_neox.final_layer_norm.weight": (hidden,),
        "gpt_neox.final_layer_norm.bias": (hidden,),
        _HEAD: (config.vocab_size, hidden),
    } | {_layer_name(index, field): shape for index in range(config.num_layers) for field, shape in layer.items()}


def _layer_name(index: int, field: str) -> str:
    return f"gpt_neox.layers.{index}.{_LAYER_TENSORS[field]}"


def _find_shards(folder: Path) -> list[Path]:
    """Returns the weight files of a checkpoint, safetensors before `.bin`, all of them existing."""
    for name in (_SAFETENSORS, _BIN):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed_shards(index)
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(f"{folder}: holds neither {_SAFETENSORS} nor {_BIN}, whole or with an index.")


def _indexed_shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: is not a readable weight index.") from error
    # An index names its neighbours, nothing elsewhere on this machine.
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index}: names {outside[0]!r}, which is no file name.")
    shards = sorted(index.parent / name for name in names)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{index}: names {_some(missing)}, which the folder lacks.")
    return shards


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], Tensor]  # A part of it. It may map the file: copy what is kept.


def _cut(name: str, shape: tuple[int, ...], share: Share) -> tuple[slice, ...]:
    """Which part of a tensor is the share's.

    Query-key-value rows lie head by head, so that a run of heads is a run of rows.
    """
    whole = tuple(slice(0, size) for size in shape)
    if ".query_key_value." in name or ".dense_h_to_4h." in name or name in (_EMBEDDING, _HEAD):
        return (share.of(shape[0]), *whole[1:])
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return (whole[0], share.of(shape[1]))
    return whole


def _read_shard(shard: Path) -> Iterator[tuple[str, _Stored]]:
    return _read_safetensors(shard) if shard.suffix == ".safetensors" else _read_bin(shard)


def _read_safetensors(shard: Path) -> Iterator[tuple[str, _Stored]]:
    with _unreadable_as_checkpoint_error(shard), safe_open(shard, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            stored = file.get_slice(name)
            yield name, _Stored(tuple(stored.get_shape()), stored.__getitem__)


def _read_bin(shard: Path) -> Iterator[tuple[str, _Stored]]:
    with _unreadable_as_checkpoint_error(shard):
        # Only the zip format of torch >= 1.6 can be mapped.
        state: Any = torch.load(shard, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(shard))
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{shard}: holds something other than named tensors.")
    for name, tensor in state.items():
        yield name, _Stored(tuple(tensor.shape), tensor.__getitem__)


@contextmanager
def _unreadable_as_checkpoint_error(shard: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(f"{shard}: is truncated, corrupt or not made of plain tensors: {reason}.") from error


def _check_shape(shard: Path, name: str, stored: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise CheckpointError(f"{shard}: holds {name}, which config.json has no place for.")
    if stored != shape:
        raise CheckpointError(f"{shard}: {name} has shape {list(stored)}; config.json asks for {list(shape)}.")


def _check_type(shard: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOAT_DTYPES:
        raise CheckpointError(f"{shard}: {name} is of type {tensor.dtype}, not a floating point type.")


def _assemble(tensors: dict[str, Tensor], config: NeoXConfig, share: Share) -> NeoXWeights:
    embed_in = tensors[_EMBEDDING]
    head = tensors.get(_HEAD, embed_in)
    # A tied checkpoint may hold the head all the same. Like transformers: one tensor if they are equal, else two.
    if config.tie_word_embeddings and torch.equal(head, embed_in):
        head = embed_in
    return NeoXWeights(
        embed_in=embed_in,
        layers=tuple(_assemble_layer(tensors, index, share) for index in range(config.num_layers)),
        final_norm_weight=tensors["gpt_neox.final_layer_norm.weight"],
        final_norm_bias=tensors["gpt_neox.final_layer_norm.bias"],
        head=head,
    )


def _assemble_layer(tensors: dict[str, Tensor], index: int, share: Share) -> LayerWeights:
    fields: dict[str, Any] = {field: tensors.get(_layer_name(index, field)) for field in _LAYER_TENSORS}
    if not share.is_first:  # Each rank's product is a part of a sum, in which a bias counts once.
        fields |= {"dense_bias": None, "mlp_out_bias": None}
    return LayerWeights(**fields)


def _some(names: list[str]) -> str:
    """Returns the first few names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
