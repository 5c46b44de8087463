"""The model: what is added to it before it is trained, what is changed while it trains, what is exported."""

import shutil
from pathlib import Path

import pytest
import torch
from oasst.prompt import ControlToken
from oasst_training.errors import RecipeError
from oasst_training.model import (
    export_model,
    fit_vocabulary,
    load_base,
    set_residual_dropout,
    use_tanh_gelu,
)
from oasst_training.tokenizer import add_control_tokens, control_id, save_tokenizer
from oasst_worker.model.config import load_config
from oasst_worker.model.weights import load_weights
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

IDS = torch.arange(2, 34).view(2, 16)


@pytest.fixture
def model(make_tiny_model) -> GPTNeoXForCausalLM:
    return make_tiny_model()


@pytest.fixture
def untuned_tokenizer() -> Tokenizer:
    """A tokenizer without the tokens of the prompt format."""
    vocabulary = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet(), start=2)}
    vocabulary |= {"<|endoftext|>": 0, "<|padding|>": 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|endoftext|>", "<|padding|>")])
    return tokenizer


def test_new_control_tokens_come_in_a_fixed_order_behind_all_others(untuned_tokenizer):
    size = untuned_tokenizer.get_vocab_size()
    add_control_tokens(untuned_tokenizer)
    names = ["prefix_end", "prefix_begin", "system", "assistant", "prompter"]
    assert [untuned_tokenizer.token_to_id(f"<|{name}|>") for name in names] == list(range(size, size + 5))


def test_control_tokens_that_were_there_keep_their_ids(tokenizer):
    ids = {token: control_id(tokenizer, token) for token in ControlToken}
    again = Tokenizer.from_str(tokenizer.to_str())
    add_control_tokens(again)
    assert {token: control_id(again, token) for token in ControlToken} == ids


@pytest.mark.parametrize("rows_before", [258, 304])
def test_an_untuned_checkpoint_gets_rows_for_the_new_tokens_up_to_a_multiple_of_sixteen(
    untuned_tokenizer, tmp_path, rows_before
):
    """258 are too few; 304 are more than are needed, as in Pythia's embedding, and the surplus goes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    before = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=rows_before, **sizes))
    before.save_pretrained(tmp_path)
    save_tokenizer(untuned_tokenizer, tmp_path)
    model, tokenizer = load_base(str(tmp_path), tmp_path, seed=0)
    assert tokenizer.get_vocab_size() == 263
    assert model.config.vocab_size == 272
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)  # As the tokenizer has them.
    for name in ("gpt_neox.embed_in.weight", "lm_head.weight"):
        weight, old = model.state_dict()[name], before.state_dict()[name]
        assert weight.shape == (272, 32)
        assert torch.equal(weight[:258], old[:258])
    again, _ = load_base(str(tmp_path), tmp_path, seed=0)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)  # New rows are drawn by the seed.


def test_a_checkpoint_that_fits_is_loaded_as_it_is(tiny_checkpoint):
    model, _ = load_base(str(tiny_checkpoint), tiny_checkpoint, seed=0)
    weights = GPTNeoXForCausalLM.from_pretrained(tiny_checkpoint).state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("config.json", lambda file: file.unlink(), "config.json"),
        ("config.json", lambda file: file.write_text('{"model_type": "llama"}'), "it is a llama; this recipe trains"),
        ("config.json", lambda file: replace(file, '"hidden_size": 32', '"hidden_size": 64'), "mismatch"),
        ("tokenizer.json", lambda file: file.unlink(), "tokenizer.json"),
        ("tokenizer.json", lambda file: file.write_text("{"), "EOF"),
        ("tokenizer.json", lambda file: replace(file, "<|padding|>", "<|filling|>"), r"has no <\|padding\|>"),
        ("model.safetensors", lambda file: file.unlink(), "model.safetensors"),
        ("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:10_000]), "header"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named_with_the_reason(tiny_checkpoint, tmp_path, file, damage, reason):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    damage(folder / file)
    with pytest.raises(RecipeError, match=rf"model_name: {folder} cannot be loaded: (.|\n)*{reason}"):
        load_base(str(folder), tmp_path, seed=0)


def test_without_dropout_the_model_computes_what_it_computed_before(model):
    expected = model.train()(IDS).logits
    set_residual_dropout(model, 0.0)
    assert torch.equal(model(IDS).logits, expected)
    set_residual_dropout(model, 0.2)
    assert torch.equal(model.eval()(IDS).logits, expected)


def test_dropout_falls_on_what_attention_and_mlp_add_and_on_nothing_else(model, make_tiny_model):
    """Against hooks on the outputs of these modules, as the original patched them."""
    hooked = make_tiny_model().train()
    dropout = nn.Dropout(0.2)
    for layer in hooked.gpt_neox.layers:
        layer.attention.register_forward_hook(lambda _, __, output: (dropout(output[0]), *output[1:]))
        layer.mlp.register_forward_hook(lambda _, __, output: dropout(output))
    set_residual_dropout(model.train(), 0.2)
    without = make_tiny_model().train()(IDS).logits
    logits = []
    for each in (model, hooked):
        torch.manual_seed(1)
        logits.append(each(IDS).logits)
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], without)


def test_tanh_gelu_is_used_in_training_and_not_exported(model, tmp_path):
    exact = model(IDS).logits
    use_tanh_gelu(model)
    approximate = model(IDS).logits
    assert not torch.equal(approximate, exact)
    torch.testing.assert_close(approximate, exact, atol=1e-3, rtol=0)
    export_model(model, tmp_path, "fp32")
    assert torch.equal(GPTNeoXForCausalLM.from_pretrained(tmp_path)(IDS).logits, exact)


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_an_exported_model_is_loaded_as_it_was_rounded(model, tmp_path, dtype, expected):
    export_model(model, tmp_path, dtype)
    loaded = GPTNeoXForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == expected
    assert model.dtype == torch.float32
    weights = loaded.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight.to(expected), weights[name]) for name, weight in model.state_dict().items())
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (0, 0)
    assert loaded.config.rope_parameters["partial_rotary_factor"] == 0.25
    assert loaded.config.max_position_embeddings == 2048
    assert loaded.config.use_parallel_residual
    assert not loaded.config.tie_word_embeddings


def test_the_worker_reads_what_is_exported_in_shards(model, tmp_path):
    export_model(model, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    weights = load_weights(tmp_path, load_config(tmp_path), dtype=torch.float16)
    assert torch.equal(weights.head, model.lm_head.weight.half())


def test_a_model_made_anew_has_padding_rows_up_to_a_multiple_of_sixteen(model, tokenizer):
    assert model.config.vocab_size == 2048 > tokenizer.get_vocab_size()
    assert model.lm_head.weight.shape == model.gpt_neox.embed_in.weight.shape == (2048, 32)
    fit_vocabulary(model, tokenizer, seed=0)
    assert model.config.vocab_size == 2048
