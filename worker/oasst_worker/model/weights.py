"""Loads the weights of a GPT-NeoX checkpoint, checked name by name and shape by shape.

Names and shapes are checked before anything is read. Layers can be read one by one as a model takes them in, so that
memory holds the model and, of the files, at most one. A rank of several reads only its share of each matrix.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oasst_worker.model.config import CheckpointError, NeoXConfig
from oasst_worker.model.ranks import Share
from oasst_worker.model.shards import Cut, StoredTensors, some

__all__ = [
    "IGNORED",
    "LayerPlace",
    "LayerRun",
    "LayerWeights",
    "NeoXWeights",
    "Progress",
    "deinterleave_qkv",
    "load_weights",
    "open_weights",
]

# Told how many bytes of weights have been read, and of how many.
Progress = Callable[[int, int], None]

_EMBEDDING = "gpt_neox.embed_in.weight"
_HEAD = "embed_out.weight"
_HEAD_ALIAS = "lm_head.weight"  # The name in memory; some tools write it to disk.

# Constants that checkpoints of older transformers carry; they follow from the configuration.
IGNORED = re.compile(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|^gpt_neox\.rotary_emb\.inv_freq$")

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
class LayerPlace:
    """Where layers that follow each other are computed."""

    num_layers: int
    device: torch.device
    is_kept: bool = True  # In the device's memory. Otherwise their weights stay on disk and are read in every step.


@dataclass(frozen=True, slots=True)
class LayerRun:
    """The layers of a place."""

    place: LayerPlace
    weights: Iterable[LayerWeights]  # In order, on the place's device.


@dataclass(frozen=True, slots=True)
class NeoXWeights:
    """All tensors of a checkpoint, in one dtype; but for the layers on one device."""

    embed_in: Tensor  # [vocab, hidden]
    runs: tuple[LayerRun, ...]
    final_norm_weight: Tensor  # [hidden]
    final_norm_bias: Tensor
    head: Tensor  # [vocab, hidden]; the same tensor as embed_in where the checkpoint ties them

    @property
    def layers(self) -> Iterable[LayerWeights]:
        """Of all runs."""
        return chain.from_iterable(run.weights for run in self.runs)


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
    weights = open_weights(folder, config, dtype=dtype, device=device, share=share)
    return replace(weights, runs=tuple(replace(run, weights=tuple(run.weights)) for run in weights.runs))


def open_weights(
    folder: Path,
    config: NeoXConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    share: Share = Share(),  # noqa: B008  # Frozen.
    places: Sequence[LayerPlace] = (),
    progress: Progress | None = None,
) -> NeoXWeights:
    """As `load_weights`, but each layer is read when an iteration comes to it, and anew by the next iteration.

    Who keeps of a layer only what it makes of it never has two copies of the model in memory. The layers are those of
    `places`, in order; without any they are all on `device`.
    """
    places = places or [LayerPlace(config.num_layers, torch.device(device))]
    starts = [0, *accumulate(place.num_layers for place in places)]
    layer_names = [_layer_names(range(start, end)) for start, end in pairwise(starts)]
    kept = [names for place, names in zip(places, layer_names, strict=True) if place.is_kept]
    reader = _Reader(folder, config, dtype=dtype, share=share, progress=progress)
    ends = reader.names - set().union(*layer_names)
    reader.expect(ends.union(*kept))
    tensors = reader.read(ends, device)
    embed_in = tensors[_EMBEDDING]
    head = tensors.get(_HEAD, embed_in)
    # A tied checkpoint may hold the head all the same. Like transformers: one tensor if they are equal, else two.
    if config.tie_word_embeddings and torch.equal(head, embed_in):
        head = embed_in
    return NeoXWeights(
        embed_in=embed_in,
        runs=tuple(
            LayerRun(place, _StoredLayers(reader, start, place, share))
            for start, place in zip(starts, places, strict=False)
        ),
        final_norm_weight=tensors["gpt_neox.final_layer_norm.weight"],
        final_norm_bias=tensors["gpt_neox.final_layer_norm.bias"],
        head=head,
    )


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


def _layer_names(indexes: Iterable[int]) -> set[str]:
    return {_layer_name(index, field) for index in indexes for field in _LAYER_TENSORS}


class _Reader:
    """Reads tensors as the model wants them: the share's part, in its order, dtype and device."""

    def __init__(
        self, folder: Path, config: NeoXConfig, *, dtype: torch.dtype, share: Share, progress: Progress | None
    ) -> None:
        self._stored = StoredTensors(folder)
        self._stored_names = _check_tensors(folder, self._stored, config)
        self._num_heads = share.of_config(config).num_heads
        self._dtype = dtype
        self._progress = progress
        self._cuts = {
            name: _cut(name, self._stored.located[stored_name].shape, share)
            for name, stored_name in self._stored_names.items()
        }
        self._bytes = {name: dtype.itemsize * _num_elements(cut) for name, cut in self._cuts.items()}
        self._expected_bytes = 0
        self._read_bytes = 0

    @property
    def names(self) -> set[str]:
        """Of the tensors there are."""
        return set(self._cuts)

    def expect(self, names: Iterable[str]) -> None:
        """Progress is told of the reading of these tensors."""
        self._expected_bytes = sum(self._bytes.get(name, 0) for name in names)

    def read(self, names: Iterable[str], device: torch.device | str) -> dict[str, Tensor]:
        """Those of these tensors that there are, by name; they own their memory."""
        wanted = {self._stored_names[name]: name for name in names if name in self._stored_names}
        tensors: dict[str, Tensor] = {}
        for stored_name, tensor in self._stored.read({stored: self._cuts[name] for stored, name in wanted.items()}):
            name = wanted[stored_name]
            if tensor.dtype not in _FLOAT_DTYPES:
                shard = self._stored.located[stored_name].shard
                raise CheckpointError(f"{shard}: {stored_name} is of type {tensor.dtype}, not a floating point type.")
            if ".attention.query_key_value." in name:
                tensor = deinterleave_qkv(tensor, self._num_heads)
            tensors[name] = tensor.to(device=device, dtype=self._dtype, copy=True)
            self._read_bytes += self._bytes[name]
            if self._progress and self._read_bytes <= self._expected_bytes:  # Not of what steps read anew.
                self._progress(self._read_bytes, self._expected_bytes)
        return tensors


@dataclass(frozen=True, slots=True)
class _StoredLayers:
    """Layers of a checkpoint, each read when it is its turn."""

    reader: _Reader
    start: int
    place: LayerPlace
    share: Share

    def __iter__(self) -> Iterator[LayerWeights]:
        for index in range(self.start, self.start + self.place.num_layers):
            names = {field: _layer_name(index, field) for field in _LAYER_TENSORS}
            tensors = self.reader.read(names.values(), self.place.device)
            fields: dict[str, Any] = {field: tensors.get(name) for field, name in names.items()}
            if not self.share.is_first:  # Each rank's product is a part of a sum, in which a bias counts once.
                fields |= {"dense_bias": None, "mlp_out_bias": None}
            yield LayerWeights(**fields)


def _check_tensors(folder: Path, stored: StoredTensors, config: NeoXConfig) -> dict[str, str]:
    """Returns the name in the files of each of the model's tensors."""
    shapes = _tensor_shapes(config)
    stored_names: dict[str, str] = {}
    for stored_name, located in stored.located.items():
        if IGNORED.search(stored_name):
            continue
        name = _HEAD if stored_name == _HEAD_ALIAS else stored_name
        if name not in shapes:
            raise CheckpointError(f"{located.shard}: holds {stored_name}, which config.json has no place for.")
        if located.shape != shapes[name]:
            raise CheckpointError(
                f"{located.shard}: {stored_name} has shape {list(located.shape)};"
                f" config.json asks for {list(shapes[name])}."
            )
        if name in stored_names:
            raise CheckpointError(f"{located.shard}: holds {stored_name}, which {stored_names[name]} is already.")
        stored_names[name] = stored_name
    if missing := sorted(shapes.keys() - stored_names.keys() - ({_HEAD} if config.tie_word_embeddings else set())):
        raise CheckpointError(f"{folder}: the checkpoint lacks {some(missing)}.")
    return stored_names


def _cut(name: str, shape: tuple[int, ...], share: Share) -> Cut:
    """Which part of a tensor is the share's.

    Query-key-value rows lie head by head, so that a run of heads is a run of rows.
    """
    whole = tuple(slice(0, size) for size in shape)
    if ".query_key_value." in name or ".dense_h_to_4h." in name or name in (_EMBEDDING, _HEAD):
        return (share.of(shape[0]), *whole[1:])
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return (whole[0], share.of(shape[1]))
    return whole


def _num_elements(cut: Cut) -> int:
    return math.prod(part.stop - part.start for part in cut)
