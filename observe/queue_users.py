"""The users of the chart's built-in queue: those that `oasst_jobs` names."""

from pathlib import Path

from oasst_jobs.acl import acl_file

__all__ = ["FILE", "write_users"]

FILE = Path(__file__).parent.parent / "helm" / "oasst-serve" / "files" / "users.acl"


def write_users() -> None:
    """The chart puts each user's hashed password in place of >PASSWORD."""
    FILE.write_text(acl_file())
