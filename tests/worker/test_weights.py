"""Checkpoints of every format give the same weights; broken ones say which file and tensor is wrong."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from oasst_worker.model.config import CheckpointError, load_config
from oasst_worker.model.shards import resolve_checkpoint
from oasst_worker.model.weights import LayerWeights, NeoXWeights, deinterleave_qkv, load_weights
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXForCausalLM

QKV = "gpt_neox.layers.0.attention.query_key_value.weight"


def load(folder: Path, dtype=torch.float32) -> NeoXWeights:
    return load_weights(folder, load_config(folder), dtype=dtype)


def tensors_of(weights: NeoXWeights) -> dict[str, torch.Tensor | None]:
    fields = {name: getattr(weights, name) for name in NeoXWeights.__slots__ if name != "runs"}
    for index, layer in enumerate(weights.layers):
        fields |= {f"{index}.{name}": getattr(layer, name) for name in LayerWeights.__slots__}
    return fields


def assert_same(left: NeoXWeights, right: NeoXWeights) -> None:
    others = tensors_of(right)
    for name, tensor in tensors_of(left).items():
        assert torch.equal(tensor, others[name]), name


def edit(folder: Path, change) -> None:
    """Applies `change` to the named tensors of a single-file checkpoint."""
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def as_bin_shards(folder: Path, num_shards: int) -> None:
    """Replaces safetensors by the layout the original checkpoint has, buffers of older transformers included."""
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    state["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    state["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    state["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(1)
    if num_shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(num_shards):
        name = f"pytorch_model-{number + 1:05}-of-{num_shards:05}.bin"
        part = dict(list(state.items())[number::num_shards])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_every_tensor_is_the_models_own(make_model, make_checkpoint):
    model, weights = make_model(), load(make_checkpoint())
    block, layer = model.gpt_neox.layers[1], [*weights.layers][1]
    assert torch.equal(weights.embed_in, model.gpt_neox.embed_in.weight)
    assert torch.equal(weights.head, model.lm_head.weight)
    assert torch.equal(weights.final_norm_weight, model.gpt_neox.final_layer_norm.weight)
    assert torch.equal(weights.final_norm_bias, model.gpt_neox.final_layer_norm.bias)
    for norm, module in (("norm1", block.input_layernorm), ("norm2", block.post_attention_layernorm)):
        assert torch.equal(getattr(layer, f"{norm}_weight"), module.weight)
        assert torch.equal(getattr(layer, f"{norm}_bias"), module.bias)
    for linear, module in (
        ("dense", block.attention.dense),
        ("mlp_in", block.mlp.dense_h_to_4h),
        ("mlp_out", block.mlp.dense_4h_to_h),
    ):
        assert torch.equal(getattr(layer, f"{linear}_weight"), module.weight)
        assert torch.equal(getattr(layer, f"{linear}_bias"), module.bias)


def test_qkv_rows_lie_in_the_order_q_k_v(make_model, make_checkpoint):
    model, weights = make_model(), load(make_checkpoint())
    x = torch.randn(5, 32)
    # transformers' own way of taking the product apart: per head, q, k and v together.
    q, k, v = model.gpt_neox.layers[0].attention.query_key_value(x).view(5, 4, 24).chunk(3, dim=-1)
    ours = torch.nn.functional.linear(x, next(iter(weights.layers)).qkv_weight, next(iter(weights.layers)).qkv_bias)
    assert torch.allclose(ours, torch.cat([part.flatten(1) for part in (q, k, v)], dim=1), atol=1e-5)


def test_deinterleaving_moves_whole_rows():
    # Two heads of dimension 2; a row is named by head, part and dimension.
    interleaved = ["0q0", "0q1", "0k0", "0k1", "0v0", "0v1", "1q0", "1q1", "1k0", "1k1", "1v0", "1v1"]
    wanted = ["0q0", "0q1", "1q0", "1q1", "0k0", "0k1", "1k0", "1k1", "0v0", "0v1", "1v0", "1v1"]
    rows = torch.arange(12)
    assert [interleaved[row] for row in deinterleave_qkv(rows, 2)] == wanted
    matrix = torch.randn(12, 7)
    assert torch.equal(deinterleave_qkv(matrix, 2), matrix[deinterleave_qkv(rows, 2)])


def test_shards_give_the_same_weights_as_one_file(make_checkpoint):
    whole = load(make_checkpoint())
    folder = make_checkpoint(max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_same(load(folder), whole)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_bin_files_with_old_buffers_give_the_same_weights(make_checkpoint, num_shards):
    folder = make_checkpoint()
    whole = load(folder)
    as_bin_shards(folder, num_shards)
    assert_same(load(folder), whole)


def test_a_bin_file_in_the_format_before_zip_is_read(make_checkpoint):
    folder = make_checkpoint()
    whole = load(folder)
    torch.save(
        load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    (folder / "model.safetensors").unlink()
    assert_same(load(folder), whole)


def test_safetensors_are_preferred_to_bin_files(make_checkpoint):
    folder = make_checkpoint()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_is_converted(make_checkpoint, dtype):
    folder = make_checkpoint()
    edit(folder, lambda state: state.update({name: tensor.half() for name, tensor in state.items()}))
    weights = load(folder, dtype)
    assert {tensor.dtype for tensor in tensors_of(weights).values()} == {dtype}
    stored = load_file(folder / "model.safetensors")["gpt_neox.embed_in.weight"]
    assert torch.equal(weights.embed_in, stored.to(dtype))


@pytest.mark.parametrize("format_", ["safetensors", "bin"])
def test_weights_do_not_hang_on_the_files(make_checkpoint, format_):
    folder = make_checkpoint()
    if format_ == "bin":
        as_bin_shards(folder, 1)
    weights = load(folder)
    before = weights.embed_in.clone()
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert torch.equal(weights.embed_in, before)


def test_the_head_may_be_called_lm_head(make_checkpoint):
    folder = make_checkpoint()
    whole = load(folder)
    edit(folder, lambda state: state.update({"lm_head.weight": state.pop("embed_out.weight")}))
    assert_same(load(folder), whole)


def test_a_tied_head_is_the_embedding(make_checkpoint):
    weights = load(make_checkpoint(tie_word_embeddings=True))
    assert weights.head is weights.embed_in


def test_a_tied_head_stored_as_well_is_the_embedding(make_checkpoint):
    folder = make_checkpoint(tie_word_embeddings=True)
    edit(folder, lambda state: state.update({"embed_out.weight": state["gpt_neox.embed_in.weight"].clone()}))
    weights = load(folder)
    assert weights.head is weights.embed_in


def test_a_stored_head_that_differs_from_its_tie_counts_as_transformers_has_it(make_checkpoint):
    folder = make_checkpoint(tie_word_embeddings=True)
    edit(folder, lambda state: state.update({"embed_out.weight": torch.ones(96, 32)}))
    reference = GPTNeoXForCausalLM.from_pretrained(folder)
    assert torch.equal(load(folder).head, reference.lm_head.weight)


def test_without_attention_biases_there_are_none(make_checkpoint):
    layer = next(iter(load(make_checkpoint(attention_bias=False)).layers))
    assert layer.qkv_bias is None
    assert layer.dense_bias is None
    assert layer.mlp_in_bias is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop(QKV), ["checkpoint", QKV]),
        (lambda state: state.pop("embed_out.weight"), ["embed_out.weight"]),
        (lambda state: state.update(extra=torch.ones(1)), ["model.safetensors", "extra"]),
        (lambda state: state.update({QKV: torch.ones(96, 31)}), ["model.safetensors", QKV, "[96, 31]", "[96, 32]"]),
        (lambda state: state.update({QKV: torch.ones(96, 32, dtype=torch.int8)}), [QKV, "int8"]),
        (
            lambda state: state.update({"lm_head.weight": state["embed_out.weight"].clone()}),
            ["model.safetensors", "which embed_out.weight is already"],
        ),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_named(make_checkpoint, change, said):
    folder = make_checkpoint()
    edit(folder, change)
    with pytest.raises(CheckpointError) as refusal:
        load(folder)
    assert all(part in str(refusal.value) for part in said)


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, 0.999])
@pytest.mark.parametrize("format_", ["safetensors", "bin"])
def test_a_truncated_file_is_named(make_checkpoint, kept, format_):
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    if format_ == "bin":
        as_bin_shards(folder, 1)
        path = folder / "pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(CheckpointError, match=path.name) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)


def test_a_corrupt_header_is_named(make_checkpoint):
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"X32"', 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


def test_a_missing_shard_is_named(make_checkpoint):
    folder = make_checkpoint(max_shard_size="20KB")
    missing = sorted(folder.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(CheckpointError, match=missing.name):
        load(folder)


@pytest.mark.parametrize("index", ["", "{}", "[]", '{"weight_map": 3}'])
def test_an_unreadable_index_is_named(make_checkpoint, index):
    folder = make_checkpoint()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(folder)


def test_an_index_cannot_reach_outside_its_folder(make_checkpoint):
    folder = make_checkpoint()
    weight_map = {"gpt_neox.embed_in.weight": "../elsewhere.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="no file name"):
        load(folder)


class Payload:
    """What an attacker would pickle: unpickling it runs a call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_pickled_code_is_refused_and_never_runs(make_checkpoint, tmp_path, save):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    save({QKV: Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_bin_file_of_other_things_is_refused(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: holds something other than named tensors"):
        load(folder)


def test_a_folder_without_weights_is_named(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        load(folder)


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_checkpoint("~/model") == tmp_path / "model"


@pytest.mark.parametrize("model", ["./nowhere", "../nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_hub_id(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_checkpoint(model)


def test_a_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_checkpoint(str(path))


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> Path:
    """The hub's cache folder, empty, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_cached_hub_repository_is_used_without_a_network(offline_hub, weights):
    repository = offline_hub / "models--some--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / weights).touch()
    assert resolve_checkpoint("some/model") == snapshot


def test_an_unknown_hub_repository_without_a_network_is_one_clear_sentence(offline_hub):
    with pytest.raises(CheckpointError, match=r"^some/model: is no local folder and could not be fetched") as refusal:
        resolve_checkpoint("some/model", revision="main")
    assert "\n" not in str(refusal.value)
