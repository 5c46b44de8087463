"""The model computes what transformers' GPTNeoX computes."""

import pytest
import torch
from oasst_worker.engine import Engine, EngineConfig, GenerationParams, Sequence
from oasst_worker.model.attention import PlainAttention, build_attention
from oasst_worker.model.config import load_config
from oasst_worker.model.linear import PlainLinear, build_linear
from oasst_worker.model.neox import NeoX
from oasst_worker.model.weights import load_weights
from oasst_worker.runtime.runner import ModelRunner
from prompt_logits import prompt_logits
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "rotary_pct": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
    # Wide enough for logits that differ clearly: greedy tokens must not hang on rounding.
    "initializer_range": 0.2,
}
VARIANTS = {
    "pythia": {},
    "rotary on the whole head": {"rotary_pct": 1.0},
    "rotary on half of the head": {"rotary_pct": 0.5, "rotary_emb_base": 500},
    "sequential residual": {"use_parallel_residual": False},
    "tied head": {"tie_word_embeddings": True},
    "no attention biases": {"attention_bias": False},
    "one big head": {"num_attention_heads": 1},
    "small heads": {"num_attention_heads": 8},
    "heads of 80": {"hidden_size": 160, "num_attention_heads": 2, "intermediate_size": 200},
    "tanh gelu": {"hidden_act": "gelu_new"},
    "one layer, sequential, tied, no biases": {
        "num_hidden_layers": 1,
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
        "attention_bias": False,
    },
    "wide epsilon": {"layer_norm_eps": 1e-3},
}
PROMPT_LENGTHS = [1, 2, 17, 64, 100]


@pytest.fixture(params=VARIANTS, scope="module")
def checkpoint(request, tmp_path_factory):
    """(reference model in fp32, folder)."""
    torch.manual_seed(0)
    reference = GPTNeoXForCausalLM(_config(**VARIANTS[request.param])).eval()
    for name, parameter in reference.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("checkpoint")
    reference.save_pretrained(folder)
    return reference, folder


def _config(**fields) -> GPTNeoXConfig:
    values = BASE | fields
    rotary = {"rotary_pct": values.pop("rotary_pct"), "rotary_emb_base": values.pop("rotary_emb_base", 10000)}
    config = GPTNeoXConfig(**values)
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": rotary["rotary_emb_base"],
        "partial_rotary_factor": rotary["rotary_pct"],
    }
    return config


FAST = (build_linear, build_attention)
PLAIN = (PlainLinear, PlainAttention)


def _runner(folder, dtype, paths=FAST) -> ModelRunner:
    config = load_config(folder)
    model = NeoX(config, load_weights(folder, config, dtype=dtype), *paths)
    return ModelRunner(model, num_blocks=64)


def _prompts(length_of=PROMPT_LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, BASE["vocab_size"], (length,), generator=generator).tolist() for length in length_of]


def _generate(runner: ModelRunner, prompts, max_new_tokens: int) -> list[list[int]]:
    engine = Engine(runner, EngineConfig(eos_token_id=0, max_positions=256, max_sequences=8, step_tokens=96))
    for number, prompt in enumerate(prompts):
        engine.add(Sequence(str(number), prompt, GenerationParams(max_new_tokens=max_new_tokens, temperature=0)))
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while engine.has_work():
        for output in engine.step():
            tokens[output.sequence_id].append(output.token_id)
    return list(tokens.values())


@torch.inference_mode()
def _reference_tokens(reference, prompt, max_new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    generated = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=1
    )
    return generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("paths", [FAST, PLAIN], ids=["fast", "plain"])
def test_logits_of_every_position_agree_within_1e_4_in_fp32(checkpoint, paths):
    reference, folder = checkpoint
    runner = _runner(folder, torch.float32, paths)
    for prompt in _prompts():
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(prompt_logits(runner, prompt), expected, rtol=0, atol=1e-4)


def test_greedy_tokens_equal_transformers_generate(checkpoint):
    reference, folder = checkpoint
    prompts = _prompts()
    expected = [_reference_tokens(reference, prompt, 24) for prompt in prompts]
    assert _generate(_runner(folder, torch.float32), prompts, 24) == expected


def test_greedy_tokens_equal_transformers_in_bf16_wherever_rounding_does_not_decide(checkpoint):
    """Both round to bf16 in places of their own, so a token counts where the best two logits are clearly apart."""
    _, folder = checkpoint
    rounded = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    runner = _runner(folder, torch.bfloat16)
    prompts = _prompts()
    generated = _generate(runner, prompts, 16)
    num_compared = 0
    for prompt, tokens in zip(prompts, generated, strict=True):
        expected = _reference_tokens(rounded, prompt, 16)
        with torch.inference_mode():
            logits = rounded(torch.tensor([prompt + expected])).logits[0].float()
        best = logits.topk(2).values
        is_clear = best[:, 0] - best[:, 1] > 0.05 * best[:, 0].abs()
        ours = prompt_logits(runner, prompt + expected).argmax(dim=1)
        assert torch.equal(ours[is_clear], logits.argmax(dim=1)[is_clear])
        num_compared += int(is_clear.sum())
        clear_from_start = [*is_clear[len(prompt) - 1 : -1].tolist(), False].index(False)
        assert tokens[:clear_from_start] == expected[:clear_from_start]
    assert num_compared > 50, "the comparison says nothing if no logits are apart"
