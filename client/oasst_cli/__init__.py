"""The `oasst` command, on top of the client."""
