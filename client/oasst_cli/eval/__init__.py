"""The lm-evaluation-harness on a running service: its model `oasst-grpc`, and `oasst eval`.

`python -m oasst_cli.eval` is the harness's own command line, with that model in it.
"""
