"""Environment variables that look like a process's options and are none: mistyped, or meant for somebody else."""

import difflib
import re
from collections.abc import Collection, Iterable

__all__ = ["MistypedVariableError", "refuse_mistyped_variables", "unknown_variables"]

# How alike a mistyped name is at least.
_LIKENESS = 0.8
# What a cluster sets for a service whose name begins as the prefix does.
_OF_A_SERVICE = re.compile(r"\w*?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)")


class MistypedVariableError(ValueError):
    """A variable names no option and was probably meant to; the sentence names both."""


def refuse_mistyped_variables(names: Iterable[str], *, prefix: str, options: Collection[str]) -> None:
    """None of `names` was meant to be an option and is none.

    Raises:
        MistypedVariableError: if one was.
    """
    for name, meant in unknown_variables(names, prefix=prefix, options=options).items():
        if meant is not None:
            raise MistypedVariableError(f"{name} is no option; did you mean {meant}?")


def unknown_variables(names: Iterable[str], *, prefix: str, options: Collection[str]) -> dict[str, str | None]:
    """Those of `names` that begin with the prefix and name no option, each with the variable that was probably meant.

    >>> unknown_variables(["APP_MODLE", "APP_PORT_80_TCP", "HOME"], prefix="APP_", options=["model", "lease_s"])
    {'APP_MODLE': 'APP_MODEL', 'APP_PORT_80_TCP': None}
    """
    known = [option.upper() for option in options]
    unknown: dict[str, str | None] = {}
    for name in sorted(names):
        option = name.upper().removeprefix(prefix)
        if name.upper().startswith(prefix) and option not in known:
            candidates = [] if _OF_A_SERVICE.fullmatch(option) else known
            likely = difflib.get_close_matches(option, candidates, n=1, cutoff=_LIKENESS)
            unknown[name] = f"{prefix}{likely[0]}" if likely else None
    return unknown
