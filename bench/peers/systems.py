"""The systems that are measured: which program holds each, in which environment, and what it has no way to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.peers.environments import CTRANSLATE2, LLAMA_CPP, OPENVINO, OURS_ENVIRONMENT, TRANSFORMERS, VLLM, Environment

__all__ = ["DTYPES", "OURS", "REFERENCE", "SYSTEMS", "System"]

DTYPES = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class System:
    name: str
    program: str  # A module of bench.peers.programs.
    environment: Environment
    cannot: Mapping[str, str] = field(default_factory=dict)  # dtype -> why it is not measured in it.


_TRANSFORMERS_INT8 = {"int8": "transformers has no int8 for a CPU of its own"}

OURS = "ours"
REFERENCE = "transformers"  # Its fp32 tokens are what all others are compared with.
SYSTEMS = {
    OURS: System("oasst-serve", "ours", OURS_ENVIRONMENT),
    REFERENCE: System("transformers generate", "transformers_static", TRANSFORMERS, _TRANSFORMERS_INT8),
    "transformers-cb": System(
        "transformers continuous batching", "transformers_continuous", TRANSFORMERS, _TRANSFORMERS_INT8
    ),
    "ctranslate2": System("CTranslate2", "ctranslate2_generator", CTRANSLATE2),
    "llama.cpp": System("llama.cpp", "llama_cpp_batch", LLAMA_CPP),
    "openvino": System("OpenVINO GenAI", "openvino_continuous", OPENVINO),
    "vllm": System(
        "vLLM (CPU)", "vllm_offline", VLLM, {"int8": "vLLM needs a checkpoint that another tool has quantized"}
    ),
}
