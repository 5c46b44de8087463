"""A GPT-NeoX of the original's kind, of any size: made anew or taken from a checkpoint, trained, exported."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from oasst.prompt import ControlToken
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer
from transformers.utils.hub import cached_file

from oasst_training.errors import RecipeError
from oasst_training.recipe import Precision
from oasst_training.tokenizer import add_control_tokens, control_id, load_tokenizer

__all__ = [
    "TORCH_DTYPES",
    "ModelShape",
    "build_model",
    "export_model",
    "fit_vocabulary",
    "load_base",
    "set_residual_dropout",
    "use_tanh_gelu",
]

TORCH_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# As in the original: the embedding may have more rows than the tokenizer has tokens.
_PAD_VOCAB_TO_MULTIPLE_OF = 16
_MAX_SHARD_SIZE = "10GB"


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


def load_base(name: str, cache_dir: Path, *, seed: int) -> tuple[GPTNeoXForCausalLM, Tokenizer]:
    """The fp32 model and the tokenizer of a checkpoint, a folder or an id on the hub, made ready for dialogues.

    Raises:
        RecipeError: there is no such checkpoint, it is of another kind, or it is broken.
    """
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
        if config.model_type != "gpt_neox":
            raise ValueError(f"it is a {config.model_type}; this recipe trains gpt_neox")
        tokenizer_file = cached_file(name, "tokenizer.json", cache_dir=cache_dir)
        tokenizer = load_tokenizer(Path(str(tokenizer_file)).parent)
        add_control_tokens(tokenizer)
        model = GPTNeoXForCausalLM.from_pretrained(name, dtype=torch.float32, cache_dir=cache_dir)
        fit_vocabulary(model, tokenizer, seed=seed)
    except Exception as error:  # `tokenizers` raises nothing narrower, and safetensors' error derives from it.
        raise RecipeError(f"model_name: {name} cannot be loaded: {error}") from error
    return model, tokenizer


def fit_vocabulary(model: GPTNeoXForCausalLM, tokenizer: Tokenizer, *, seed: int) -> None:
    """The model has a row for each token, up to a multiple of 16, and names the ids that the tokenizer has.

    New rows are drawn as an untrained model's. Surplus rows of a larger embedding are cut off, as the original's were.
    """
    torch.manual_seed(seed)
    if model.config.vocab_size != _padded_vocab_size(tokenizer):
        model.resize_token_embeddings(_padded_vocab_size(tokenizer), mean_resizing=False)
    model.config.bos_token_id = model.config.eos_token_id = control_id(tokenizer, ControlToken.END_OF_TEXT)
    model.config.pad_token_id = control_id(tokenizer, ControlToken.PADDING)


def set_residual_dropout(model: GPTNeoXForCausalLM, probability: float) -> None:
    """Drops out what attention and MLP add to the residual stream, in every layer alike, while the model trains.

    The config's own `hidden_dropout` would drop out embeddings too, which the original did not.
    """
    for layer in _layers(model):
        layer.post_attention_dropout.p = probability
        layer.post_mlp_dropout.p = probability


def use_tanh_gelu(model: GPTNeoXForCausalLM) -> None:
    """GELU is computed by its tanh approximation. The config, and so an exported model, keeps its own."""
    for layer in _layers(model):
        layer.mlp.act = nn.GELU(approximate="tanh")


def export_model(
    model: GPTNeoXForCausalLM, directory: Path, dtype: Precision = "fp16", *, max_shard_size: str = _MAX_SHARD_SIZE
) -> None:
    """Writes config.json, generation_config.json and the weights as safetensors, rounded to `dtype`, in shards."""
    weights = {name: weight.detach().to("cpu", TORCH_DTYPES[dtype]) for name, weight in model.state_dict().items()}
    with torch.device("meta"):
        rounded = GPTNeoXForCausalLM(deepcopy(model.config))
    rounded.load_state_dict(weights, assign=True)
    rounded.tie_weights()
    rounded.save_pretrained(directory, max_shard_size=max_shard_size)


def _layers(model: GPTNeoXForCausalLM) -> list[GPTNeoXLayer]:
    return [layer for layer in model.gpt_neox.layers if isinstance(layer, GPTNeoXLayer)]


def _padded_vocab_size(tokenizer: Tokenizer) -> int:
    return -(-tokenizer.get_vocab_size() // _PAD_VOCAB_TO_MULTIPLE_OF) * _PAD_VOCAB_TO_MULTIPLE_OF
