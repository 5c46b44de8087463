"""What of a step each operator takes."""

import pytest

from bench import profile


def test_what_the_operators_took_for_the_prompts_is_no_steps(monkeypatch):
    clock = profile._Clock()

    def steps():
        clock.seconds["linears"] = 9.0  # For the prompts.
        for step_s in (0.1, 0.3, 0.2):
            clock.seconds["linears"] = clock.seconds.get("linears", 0.0) + step_s / 4
            yield step_s, None

    monkeypatch.setattr(profile, "_decoding", lambda *_: [steps()])
    operators_ms = profile._operators_ms(None, clock, 1, 1, rounds=1)
    assert operators_ms == pytest.approx({"linears": 50.0, "rest": 150.0})
