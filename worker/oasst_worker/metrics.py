"""Every metric of the worker, declared once. Base units; no label holds anything a caller chose."""

from dataclasses import asdict, fields

from oasst_jobs import ClaimedJob, PushStatus, SweepReport
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from oasst_worker.generating import GeneratingJob
from oasst_worker.held import HeldJob
from oasst_worker.loop import EngineLoad, StepReport
from oasst_worker.scoring import ScoringJob

__all__ = ["WorkerMetrics"]

_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5, 10)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_WAIT_SECONDS = (0.005, 0.025, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_CALL_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
_BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class WorkerMetrics:
    """The worker's metrics in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"oasst_worker_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"oasst_worker_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"oasst_worker_{name}", text, buckets=buckets, registry=registry)

        self.step_seconds = histogram("step_seconds", "Duration of an engine step.", _STEP_SECONDS)
        self.batch_size = histogram("batch_size", "Sequences in an engine step.", _BATCH_SIZES)
        self.prefill_tokens = counter("prefill_tokens_total", "Prompt tokens computed, recomputed ones included.")
        self.decode_tokens = counter("decode_tokens_total", "Tokens computed one at a time.")
        self.generated_tokens = counter("generated_tokens_total", "Tokens drawn.")
        self.scored_tokens = counter("scored_tokens_total", "Tokens of continuations whose likelihood was computed.")
        self.preemptions = counter("preemptions_total", "Sequences that gave their KV cache back to be computed again.")
        self.out_of_memory = counter(
            "out_of_memory_total", "Steps for which the device had no memory; they were tried again, smaller."
        )
        self.prefix_lookup_tokens = counter(
            "prefix_lookup_tokens_total", "Prompt tokens of sequences that began to run: what could have been reused."
        )
        self.prefix_hit_tokens = counter("prefix_hit_tokens_total", "Those of them that were in the KV cache already.")
        self.drafted_tokens = counter("drafted_tokens_total", "Tokens guessed ahead of what was drawn.")
        self.accepted_tokens = counter("accepted_tokens_total", "Those of them that were right: each saved a step.")
        self.running_sequences = gauge("running_sequences", "Sequences that hold KV cache.")
        self.waiting_sequences = gauge("waiting_sequences", "Sequences that wait inside the engine.")
        self.max_sequences = gauge("max_sequences", "Sequences that may run at once.")
        self.kv_tokens_used = gauge("kv_tokens_used", "Positions of KV cache in use.")
        self.kv_tokens_total = gauge("kv_tokens_capacity", "Positions of KV cache in all.")

        self.jobs = counter(
            "jobs_total",
            "Jobs that left this worker: finished, failed, refused, released, abandoned, or the status that lost them.",
            "outcome",
        )
        self.claimed_jobs = counter("claimed_jobs_total", "Jobs claimed.")
        self.resumed_jobs = counter("resumed_jobs_total", "Jobs claimed that had tokens of another claim.")
        self.fenced_pushes = counter("fenced_pushes_total", "Jobs whose push was refused: another worker has them.")
        # The same name wherever it is counted: any process may have swept.
        self.swept = Counter(
            "oasst_queue_swept_total", "Jobs that sweeps set right, by what was done.", ["kind"], registry=registry
        )
        for kind in fields(SweepReport):
            self.swept.labels(kind.name)  # Shown as 0 from the start, so that the first one is an increase.
        self.queue_wait_seconds = histogram(
            "queue_wait_seconds", "From a job's arrival in the queue to its first claim.", _WAIT_SECONDS
        )
        self.time_to_first_token_seconds = histogram(
            "time_to_first_token_seconds", "From the claim of a job to its first token.", _FIRST_TOKEN_SECONDS
        )
        self.time_per_output_token_seconds = histogram(
            "time_per_output_token_seconds", "Mean time per token after the first, by job.", _TOKEN_SECONDS
        )

        self.claim_seconds = histogram("claim_seconds", "Duration of a claim that brought jobs.", _CALL_SECONDS)
        self.push_seconds = histogram("push_seconds", "Duration of a push, tries that failed included.", _CALL_SECONDS)
        self.queue_errors = counter("queue_errors_total", "Calls that the queue did not answer.", "operation")
        self.reconcile_repairs = counter(
            "reconcile_repairs_total", "Disagreements between jobs and indexes that were put right; should stay 0."
        )
        self.loop_failures = counter(
            "loop_failures_total", "Errors that nobody foresaw in the worker's upkeep of the queue; it goes on.", "loop"
        )
        self._load = EngineLoad()  # As of the last record.

    def record_claim(self, claimed: ClaimedJob) -> None:
        self.claimed_jobs.inc()
        if claimed.end_position:
            self.resumed_jobs.inc()
        if claimed.is_first_claim:
            self.queue_wait_seconds.observe(claimed.waited_ms / 1000)

    def record_step(self, report: StepReport) -> None:
        if not report.num_sequences:
            return
        self.step_seconds.observe(report.step_s)
        self.batch_size.observe(report.num_sequences)
        self.prefill_tokens.inc(report.num_prefill_tokens)
        self.decode_tokens.inc(report.num_decode_tokens)
        self.generated_tokens.inc(report.num_drawn_tokens)

    def record_sweep(self, report: SweepReport) -> None:
        """Adds what a sweep of this process set right in the queue."""
        for kind, number in asdict(report).items():
            self.swept.labels(kind).inc(number)

    def record_load(self, load: EngineLoad, *, max_sequences: int, kv_tokens_total: int) -> None:
        """The gauges show `load`."""
        self.running_sequences.set(load.num_running)
        self.waiting_sequences.set(load.num_waiting)
        self.max_sequences.set(max_sequences)
        self.kv_tokens_used.set(load.kv_tokens_used)
        self.kv_tokens_total.set(kv_tokens_total)
        self.preemptions.inc(load.num_preemptions - self._load.num_preemptions)
        self.prefix_lookup_tokens.inc(load.num_prompt_tokens - self._load.num_prompt_tokens)
        self.prefix_hit_tokens.inc(load.num_cached_tokens - self._load.num_cached_tokens)
        self.out_of_memory.inc(load.num_out_of_memory - self._load.num_out_of_memory)
        self.drafted_tokens.inc(load.num_drafted_tokens - self._load.num_drafted_tokens)
        self.accepted_tokens.inc(load.num_accepted_tokens - self._load.num_accepted_tokens)
        self._load = load

    def record_end(self, job: HeldJob) -> None:
        """The job ended here, with an outcome."""
        self.jobs.labels(job.outcome).inc()
        if isinstance(job, ScoringJob):
            self.scored_tokens.inc(job.num_scored_tokens)
        elif isinstance(job, GeneratingJob):
            self._record_times(job)

    def _record_times(self, job: GeneratingJob) -> None:
        if job.prefill_s is not None:
            self.time_to_first_token_seconds.observe(job.prefill_s)
        later_tokens = job.num_new_tokens - job.claimed.job.n
        if job.decode_s is not None and later_tokens > 0:
            # The choices of a job decode side by side.
            self.time_per_output_token_seconds.observe(job.decode_s * job.claimed.job.n / later_tokens)

    def record_drop(self, status: PushStatus) -> None:
        """The job was lost, for this reason."""
        self.jobs.labels(status.value).inc()
        if status is PushStatus.FENCED:
            self.fenced_pushes.inc()
