"""The users of the chart's built-in queue: those that `oasst_jobs` needs, and one that watches."""

from pathlib import Path

from oasst_jobs.acl import Role, acl_rules

__all__ = ["FILE", "render_users", "write_users"]

FILE = Path(__file__).parent.parent / "helm" / "oasst-serve" / "files" / "users.acl"

# What redis_exporter asks for.
_WATCHING = ("ping", "info", "config|get", "client|setname", "latency|latest", "latency|histogram", "slowlog|get")


def render_users() -> str:
    """Lines of an ACL file; the chart puts each user's hashed password in place of >PASSWORD."""
    rules = {str(role): acl_rules(role) for role in Role}
    rules["exporter"] = ["resetkeys", "resetchannels", "-@all", *(f"+{command}" for command in _WATCHING)]
    lines = [f"user oasst-{user} on >PASSWORD {' '.join(rules[user])}\n" for user in rules]
    return "".join(["user default off\n", *lines])


def write_users() -> None:
    FILE.write_text(render_users())
