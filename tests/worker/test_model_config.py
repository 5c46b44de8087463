"""What `config.json` says, in both styles, and what stops the start."""

import json

import pytest
import torch
from oasst_worker.model.config import CheckpointError, load_config

TRANSFORMERS_4 = {
    "model_type": "gpt_neox",
    "vocab_size": 50288,
    "hidden_size": 5120,
    "num_hidden_layers": 36,
    "num_attention_heads": 40,
    "intermediate_size": 20480,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "layer_norm_eps": 1e-05,
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture
def load(tmp_path):
    """Loads the published checkpoint's configuration with fields changed; None removes a field."""

    def load_changed(**changes):
        fields = {name: value for name, value in (TRANSFORMERS_4 | changes).items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return load_config(tmp_path)

    return load_changed


def test_reads_the_published_checkpoint_written_by_transformers_4(load):
    config = load()
    assert (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads) == (50288, 5120, 36, 40)
    assert (config.head_dim, config.rotary_dim, config.rotary_base) == (128, 32, 10000.0)
    assert (config.intermediate_size, config.max_positions, config.layer_norm_eps) == (20480, 2048, 1e-5)
    assert (config.parallel_residual, config.tie_word_embeddings, config.attention_bias) == (True, False, True)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (0, 0, None)
    assert (config.hidden_act, config.dtype) == ("gelu", torch.float16)


def test_reads_what_the_installed_transformers_writes(make_checkpoint):
    config = load_config(
        make_checkpoint(
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
            use_parallel_residual=False,
            tie_word_embeddings=True,
            attention_bias=False,
            hidden_act="gelu_new",
            layer_norm_eps=1e-6,
            dtype="bfloat16",
        )
    )
    assert (config.head_dim, config.rotary_dim, config.rotary_base) == (8, 4, 500.0)
    assert (config.parallel_residual, config.tie_word_embeddings, config.attention_bias) == (False, True, False)
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu_tanh", 1e-6)


def test_rope_parameters_outrank_the_older_fields(load):
    rope = {"rope_type": "default", "rope_theta": 777, "partial_rotary_factor": 1.0}
    config = load(rope_parameters=rope, rotary_pct=0.25, rotary_emb_base=10000)
    assert (config.rotary_dim, config.rotary_base) == (128, 777.0)


def test_fields_that_transformers_leaves_out_have_its_defaults(load):
    left_out = ["max_position_embeddings", "rotary_pct", "rotary_emb_base", "layer_norm_eps", "hidden_act"]
    left_out += ["use_parallel_residual", "tie_word_embeddings", "bos_token_id"]
    config = load(**dict.fromkeys(left_out), torch_dtype=None)
    assert (config.max_positions, config.rotary_dim, config.rotary_base) == (2048, 32, 10000.0)
    assert (config.layer_norm_eps, config.hidden_act, config.parallel_residual) == (1e-5, "gelu", True)
    assert (config.tie_word_embeddings, config.bos_token_id, config.dtype) == (False, None, torch.float32)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_the_tanh_variants_of_gelu_are_one(load, name):
    assert load(hidden_act=name).hidden_act == "gelu_tanh"


def test_an_end_of_text_list_of_one_id_is_that_id(load):
    assert load(eos_token_id=[7]).eos_token_id == 7


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"model_type": "llama"}, "model_type", "'llama'"),
        ({"model_type": None}, "model_type", "None"),
        ({"hidden_size": None}, "hidden_size", "missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "0"),
        ({"vocab_size": "50288"}, "vocab_size", "'50288'"),
        ({"intermediate_size": True}, "intermediate_size", "True"),
        ({"num_attention_heads": 33}, "num_attention_heads", "33"),
        ({"hidden_act": "relu"}, "hidden_act", "'relu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", "not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type", "'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters", "factor"),
        ({"rotary_pct": 1.5}, "rotary_pct", "1.5"),
        ({"rotary_pct": 0.0}, "rotary_pct", "0.0"),
        ({"rotary_pct": 3 / 128}, "rotary_pct", "3 of 128"),
        ({"rotary_emb_base": -1}, "rotary_emb_base", "-1"),
        ({"layer_norm_eps": 0}, "layer_norm_eps", "0"),
        ({"use_parallel_residual": "yes"}, "use_parallel_residual", "'yes'"),
        ({"eos_token_id": None}, "eos_token_id", "missing"),
        ({"eos_token_id": [0, 1]}, "eos_token_id", "[0, 1]"),
        ({"pad_token_id": 50288}, "pad_token_id", "50288"),
        ({"torch_dtype": "int8"}, "dtype", "'int8'"),
        ({"quantization_config": {"bits": 8}}, "quantization_config", "not supported"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence_naming_file_and_field(load, changes, field, said):
    with pytest.raises(CheckpointError) as refusal:
        load(**changes)
    sentence = str(refusal.value)
    assert "config.json: " + field in sentence
    assert said in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        load_config(tmp_path)
