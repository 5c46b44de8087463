"""For who looks after the queue's server: `python -m oasst_jobs --help`.

acl      prints a Redis ACL file: the users that gateways, workers, an admin and redis_exporter need, and no other
load     loads the functions, which gateways and workers with those users may only call
dead     lists the jobs that were set aside because workers died with them; never a prompt
revive   has one of them wait again
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import aclosing

from oasst_jobs.acl import acl_file
from oasst_jobs.client import QueueClient
from oasst_jobs.connection import connect
from oasst_jobs.errors import QueueError
from oasst_jobs.library import LIBRARY

_MAX_LISTED = 100


def main(arguments: Sequence[str] = sys.argv[1:]) -> int:
    """Does what the arguments say; the process's exit code."""
    options = _make_parser().parse_args(arguments)
    if options.command == "acl":
        sys.stdout.write(acl_file())
        return 0
    try:
        return asyncio.run(_act(options))
    except (QueueError, ValueError) as error:
        sys.stderr.write(f"oasst_jobs: {error}\n")
        return 1


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m oasst_jobs", description="Looks after the queue's server.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("acl", help="print the users as an ACL file; put passwords in place of PASSWORD")
    load = commands.add_parser("load", help="load the functions")
    dead = commands.add_parser("dead", help="list the jobs that were set aside, the last to die first")
    revive = commands.add_parser("revive", help="have a job that was set aside wait again, without a deadline")
    revive.add_argument("job_id", help="as `dead` and the logs tell it")
    load.add_argument("--redis-url", required=True, help="the server, as a user that may load functions")
    for command in (dead, revive):
        command.add_argument("--redis-url", required=True, help="the server, as any of the queue's users")
        command.add_argument("--queue-shards", type=int, default=1, help="as gateways and workers are given it")
    return parser


async def _act(options: argparse.Namespace) -> int:
    num_shards = getattr(options, "queue_shards", 1)
    async with aclosing(connect(options.redis_url, num_shards=num_shards)) as redis:
        client = QueueClient(redis, num_shards=num_shards)
        if options.command == "load":
            await client.load_functions()
            sys.stdout.write(f"{LIBRARY.name} is loaded\n")
            return 0
        await client.check_server()
        if options.command == "dead":
            for letter in await client.dead(_MAX_LISTED):
                tokens = f"prompt_tokens={len(letter.job.prompt_token_ids)} tokens={letter.end_position}"
                told = f"died_s_ago={letter.age_ms // 1000} model={letter.job.model} {tokens}"
                sys.stdout.write(f"job_id={letter.job_id} {told}\n")
            return 0
        if await client.revive(options.job_id):
            sys.stdout.write(f"{options.job_id} waits again\n")
            return 0
        sys.stderr.write(f"oasst_jobs: {options.job_id} was not set aside: see `python -m oasst_jobs dead`\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
