"""The presets of sampling: Open-Assistant's own, in words that the API has."""

import pytest
from oasst.presets import PRESETS
from oasst.v1 import generation_pb2

# Open-Assistant's table: top_k, top_p, typical_p, temperature, repetition_penalty, max_new_tokens.
TABLE = {
    "k50": (50, 0.95, None, 0.75, 1.2, 1024),
    "k50-Creative": (50, 0.95, None, 0.85, 1.2, 1024),
    "k50-Precise": (50, 0.95, None, 0.1, 1.2, 1024),
    "k50-Original": (50, 0.95, None, 0.9, 1.2, 1024),
    "k50-Plugins": (50, None, None, 0.35, pytest.approx(1.1111, abs=1e-4), 1024),
    "nucleus9": (None, 0.9, None, 0.8, 1.2, 1024),
    "typical2": (None, None, 0.2, 0.8, 1.2, 1024),
    "typical3": (None, None, 0.3, 0.8, 1.2, 1024),
}
FIELDS = ("top_k", "top_p", "typical_p", "temperature", "repetition_penalty", "max_new_tokens")


def test_the_presets_are_the_eight_of_open_assistant():
    assert {name: tuple(preset.get(field) for field in FIELDS) for name, preset in PRESETS.items()} == TABLE


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_of_a_preset_is_a_field_of_the_api(name):
    known = {
        field.name
        for message in (generation_pb2.SamplingParams, generation_pb2.GenerationLimits)
        for field in message.DESCRIPTOR.fields
    }
    assert set(PRESETS[name]) <= known


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_cannot_be_changed(name):
    with pytest.raises(TypeError):
        PRESETS[name]["temperature"] = 2.0
