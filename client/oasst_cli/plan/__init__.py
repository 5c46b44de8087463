"""`oasst plan`: how many GPUs, gateways and queue servers a load needs."""
