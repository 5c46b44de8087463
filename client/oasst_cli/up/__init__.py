"""`oasst up`: the whole service on this machine.

`stack` says which processes there are, `supervisor` keeps each of them running, `child` is one that runs.
"""
