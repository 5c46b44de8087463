"""The named sampling presets of Open-Assistant's inference server.

Values: `inference/server/oasst_inference_server/routes/configs.py`, `DEFAULT_PARAMETER_CONFIGS`. The server passed an
unset `top_k` on as "no top-k", so the nucleus and typical presets really have none.
"""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["PRESETS"]

_REPETITION_PENALTY = 1.2


def _preset(**values: float) -> Mapping[str, float]:
    return MappingProxyType({"repetition_penalty": _REPETITION_PENALTY, "max_new_tokens": 1024, **values})


# Preset name -> field of SamplingParams or GenerationLimits -> value. Fields not named are off.
PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "k50": _preset(temperature=0.75, top_k=50, top_p=0.95),
        "k50-Creative": _preset(temperature=0.85, top_k=50, top_p=0.95),
        "k50-Precise": _preset(temperature=0.1, top_k=50, top_p=0.95),
        "k50-Original": _preset(temperature=0.9, top_k=50, top_p=0.95),
        "k50-Plugins": _preset(temperature=0.35, top_k=50, repetition_penalty=1 / 0.90),
        "nucleus9": _preset(temperature=0.8, top_p=0.9),
        "typical2": _preset(temperature=0.8, typical_p=0.2),
        "typical3": _preset(temperature=0.8, typical_p=0.3),
    }
)
