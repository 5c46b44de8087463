"""What each side may do in Redis, as ACL rules: gateways and workers work on the queue, an admin loads its functions.

A function runs with the rights of whoever calls it, so gateways and workers need the commands that the functions make.
They reach the queue's keys only, and can neither read nor change code, settings, users or other keys.
"""

import re
from enum import StrEnum

from oasst_jobs.library import LIBRARY

__all__ = ["Role", "acl_file", "acl_rules"]

# The last release's functions run beside ours while a fleet is being replaced. Ours do without these.
_IN_OLDER_FUNCTIONS = {"hgetall"}

_IN_FUNCTIONS = _IN_OLDER_FUNCTIONS | {
    name.lower() for name in re.findall(r"redis\.p?call\(\s*'(\w+)'", LIBRARY.source)
}

# To get a connection, and to find one's way in a cluster.
_CONNECTING = ("ping", "select", "client|setinfo", "client|setname", "command", "cluster|slots", "cluster|shards")


class Role(StrEnum):
    """Who talks to Redis."""

    GATEWAY = "gateway"
    WORKER = "worker"
    ADMIN = "admin"


_OWN_COMMANDS = {
    Role.GATEWAY: ("fcall", "wait", "xread", "xrevrange", "xtrim", *_IN_FUNCTIONS),
    Role.WORKER: ("fcall", "blpop", *_IN_FUNCTIONS),
    Role.ADMIN: ("fcall", "function|load", "function|list", "function|delete", *_IN_FUNCTIONS),
}

# What redis_exporter asks for: an observer sees no key.
_OBSERVING = ("ping", "info", "config|get", "client|setname", "latency|latest", "latency|histogram", "slowlog|get")


def acl_rules(role: Role) -> list[str]:
    """The rules behind `ACL SETUSER name on >password`, or behind the same in a file of users.

    Sentinels, and users that take backups, need users of their own.
    """
    commands = sorted({*_CONNECTING, *_OWN_COMMANDS[role]})
    return ["resetkeys", "~oasst:*", "resetchannels", "-@all", *(f"+{command}" for command in commands)]


def acl_file() -> str:
    """A whole ACL file: a user for each role, one for redis_exporter, and nobody without a name.

    Passwords go in place of PASSWORD.
    """
    rules = {str(role): acl_rules(role) for role in Role}
    rules["exporter"] = ["resetkeys", "resetchannels", "-@all", *(f"+{command}" for command in _OBSERVING)]
    users = (f"user oasst-{user} on >PASSWORD {' '.join(rules[user])}\n" for user in rules)
    return "".join(["user default off\n", *users])
