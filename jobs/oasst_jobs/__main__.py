"""For who sets the queue's server up: `python -m oasst_jobs --help`.

acl      prints the users that gateways, workers and an admin need, as lines of a Redis ACL file
load     loads the functions, which gateways and workers with those users may only call
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from oasst_jobs.acl import Role, acl_rules
from oasst_jobs.client import QueueClient
from oasst_jobs.connection import connect
from oasst_jobs.errors import QueueError
from oasst_jobs.library import LIBRARY


def main(arguments: Sequence[str] = sys.argv[1:]) -> int:
    """Does what the arguments say; the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m oasst_jobs", description="Sets up the queue's Redis or Valkey.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("acl", help="print the users as lines of an ACL file; put passwords in place of PASSWORD")
    load = commands.add_parser("load", help="load the functions")
    load.add_argument("--redis-url", required=True, help="the server, as a user that may load functions")
    options = parser.parse_args(arguments)
    if options.command == "acl":
        sys.stdout.writelines(_user_line(role) for role in Role)
        return 0
    try:
        asyncio.run(_load(options.redis_url))
    except (QueueError, ValueError) as error:
        sys.stderr.write(f"oasst_jobs: {error}\n")
        return 1
    sys.stdout.write(f"{LIBRARY.name} is loaded\n")
    return 0


def _user_line(role: Role) -> str:
    return f"user oasst-{role} on >PASSWORD {' '.join(acl_rules(role))}\n"


async def _load(redis_url: str) -> None:
    redis = connect(redis_url)
    try:
        await QueueClient(redis).check_server()
    finally:
        await redis.aclose()


if __name__ == "__main__":
    sys.exit(main())
