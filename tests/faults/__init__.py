"""Proof of the promises: each fault of the table in docs/reliability.md, done to real processes under load.

A row of the table is a function in `rows/`. It breaks something in a `World` (Valkey, workers and gateways as
processes of their own, links between them) while a `Load` of callers streams from it. The workers' model is verifiable:
what each token must be is known to the callers, so any gap, repeat or stale write shows (`checker.py`).

`python -m faults --help` (with tests/ on the path), or `make faults`, runs rows with many seeds and prints the table.
"""
