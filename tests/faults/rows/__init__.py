"""The rows of the fault table, in its order."""

from faults.rows import callers, network, queue, service, workers
from faults.table import Row

__all__ = ["ROWS"]

ROWS: tuple[Row, ...] = (
    workers.killed_in_prefill,
    workers.killed_in_decoding,
    workers.killed_after_a_claim,
    workers.killed_before_a_push,
    workers.killed_after_a_push,
    queue.is_killed,
    queue.hangs_for_longer_than_a_lease,
    network.gateway_is_cut_off_from_the_queue,
    network.worker_is_cut_off_for_short,
    network.worker_is_cut_off_for_long,
    network.connections_to_the_queue_break,
    callers.read_slowly,
    queue.memory_is_full,
    workers.device_is_lost,
    workers.logits_are_not_finite,
    workers.step_hangs,
    callers.ask_twice_at_once,
    workers.zombie_returns,
    callers.leave,
    callers.flood,
    callers.run_out_of_time_in_the_queue,
    callers.cancel_all_at_once,
    service.rolling_restart_of_workers,
    service.killed_in_drain,
    service.scraped,
    queue.emptied,
    queue.is_slow,
    service.few_files,
)
