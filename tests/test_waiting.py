"""What a test says that waited in vain."""

import functools

import pytest
from waiting import until, wait_until


def never(*_: object) -> bool:
    return False


async def never_told() -> bool:
    return False


async def test_who_waits_in_vain_says_for_what() -> None:
    with pytest.raises(AssertionError, match=r"waited 0\.01 s for the moon"):
        await until(never_told, "the moon", timeout_s=0.01)
    with pytest.raises(AssertionError, match=r"for .*lambda: never\(1\)"):
        await until(lambda: never(1), timeout_s=0.01)
    with pytest.raises(AssertionError, match=r"for functools\.partial.*never"):
        wait_until(functools.partial(never, 1), timeout_s=0.01)


async def test_a_timeout_of_the_question_itself_is_no_timeout_of_the_wait() -> None:
    async def ask() -> bool:
        raise TimeoutError("the other side")

    with pytest.raises(TimeoutError, match="the other side"):
        await until(ask)
