"""A system whose tokens are known: it counts on from a prompt's last token. Its dtype says how it misbehaves."""

import sys
import time

from bench.peers.answering import Generate, Setup, serve


def load(setup: Setup) -> Generate:
    print("what a library prints while it loads")
    if setup.dtype == "cannot load":
        raise NotImplementedError("this processor\nhas no such numbers")
    if setup.dtype == "dies":
        print("it ran out of luck", file=sys.stderr)
        sys.exit(3)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        print("what a library prints while it generates")
        if setup.dtype == "hangs":
            time.sleep(600)
        if setup.dtype == "stops early":
            new_tokens -= 1
        return [[prompt[-1] + 1 + step for step in range(new_tokens)] for prompt in prompts]

    return generate


if __name__ == "__main__":
    serve(load)
