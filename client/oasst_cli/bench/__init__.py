"""`oasst bench`: a load generator, and what it measures.

`arrivals` and `workload` say what is sent and when, `driver` sends it, `measurement` makes figures of what happened,
`screen` and `plots` show them, `overhead` measures the tool itself.
"""
