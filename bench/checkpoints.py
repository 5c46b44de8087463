"""The checkpoints that are measured: the demo, and random weights in the shapes of Pythia models."""

import shutil
from pathlib import Path

import torch

__all__ = ["DEMO", "SHAPES", "complete_with_demo_tokenizer", "random_checkpoint", "random_prompts"]

DEMO = Path(__file__).parent.parent / "training" / "oasst_training" / "demo"

# EleutherAI's Pythia models, with the vocabulary of the OASST fine-tune.
SHAPES = {
    "70m": {"num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8},
    "160m": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "1b": {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 8},
}
VOCAB_SIZE = 50288


def random_checkpoint(shape: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of random weights of this shape in `folder`, made once, in files of at most 500 MB."""
    path = folder / shape
    if not (path / "config.json").exists():
        # Seconds to import: most who want the demo need none of it.
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        torch.manual_seed(0)
        sizes = SHAPES[shape]
        config = GPTNeoXConfig(
            vocab_size=VOCAB_SIZE,
            intermediate_size=4 * sizes["hidden_size"],
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=0,
            dtype=dtype,
            **sizes,
        )
        GPTNeoXForCausalLM(config).to(dtype).save_pretrained(path, max_shard_size="500MB")
    return path


def complete_with_demo_tokenizer(folder: Path) -> None:
    """`folder` has a tokenizer: the demo's, where it had none."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).exists():
            shutil.copy(DEMO / name, folder / name)


def random_prompts(count: int, length: int, vocab_size: int, *, seed: int = 0) -> list[list[int]]:
    """The same prompts for the same seed; no control tokens in them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(300, vocab_size - 100, (count, length), generator=generator).tolist()
