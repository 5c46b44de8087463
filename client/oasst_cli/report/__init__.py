"""Sampling reports: a file of prompts answered under several sampling configs, and what two such reports share.

The format is that of oasst-model-eval's `model_eval/manual/sampling_report.py`, so that its comparer reads ours and
we read its reports.
"""
