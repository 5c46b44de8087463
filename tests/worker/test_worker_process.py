"""The worker as operators meet it: a process that starts, serves, dies, is asked to stop, and says why it ended."""

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import oasst_training
import psutil
import pytest
from oasst.jobs.v1.job_pb2 import Job
from oasst_jobs import JobState, QueueClient, connect
from oasst_telemetry import NO_TRACER, ProbeServer
from oasst_worker.__main__ import main, serve
from oasst_worker.health import WorkerHealth
from oasst_worker.loop import StepWatchdog
from oasst_worker.served_model import ServedModel
from oasst_worker.settings import StartError, WorkerSettings, read_settings, unread_variables
from oasst_worker.worker import Worker
from prometheus_client import CollectorRegistry
from scripted_worker import MODEL, ScriptedExecutor, expected_text, make_engine, make_intake, make_job
from serving_line import read_serving_line
from valkey_server import free_port
from waiting import until
from watched_queue import Queue, choice_text

DEMO = Path(oasst_training.__file__).parent / "demo"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


class WorkerProcess:
    """A worker that serves, and what it said."""

    def __init__(self, process: subprocess.Popen[str], event: dict[str, str]) -> None:
        self.process = process
        self.event = event

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of its HTTP endpoint."""
        return get(self.event["metrics"], path)

    async def end(self, number: signal.Signals) -> int:
        """The exit code after this signal."""
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 30)


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


@pytest.fixture
def start_process(valkey_url: str, tmp_path: Path) -> Iterator[Callable[..., Awaitable[WorkerProcess]]]:
    """Starts workers on the demo checkpoint, and kills what is left of them."""
    with ExitStack() as exits:

        def start(*options: str) -> WorkerProcess:
            log = tmp_path / "worker.log"
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "oasst_worker", "--model", str(DEMO), "--redis-url", valkey_url),
                    *("--metrics-listen", "127.0.0.1:0", "--threads", "1", *options),
                ],
                env=ONE_THREAD,
                stdout=subprocess.PIPE,
                stderr=exits.enter_context(log.open("a")),
                text=True,
            )
            exits.callback(process.communicate)
            exits.callback(process.kill)
            return WorkerProcess(process, read_serving_line(process, log))

        yield partial(asyncio.to_thread, start)


def demo_job(request_id: str) -> Job:
    """A long answer, drawn with a seed."""
    job = make_job(request_id, max_new_tokens=250, ignore_eos=True, stop=["\n\n\n\n"])
    job.model = "demo"
    job.prompt_token_ids[:] = range(300, 340)
    return job


async def run_to_end(*arguments: str) -> tuple[int, str]:
    """Exit code and what was written to stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "oasst_worker", "--metrics-listen", "127.0.0.1:0", *arguments),
        env=ONE_THREAD,
        stderr=subprocess.PIPE,
    )
    _, said = await process.communicate()
    return process.returncode or 0, said.decode()


async def _has_logged(queue: Queue, job_id: str, num_tokens: int) -> bool:
    return (await queue.log(job_id)).end_position >= num_tokens


async def test_a_worker_asked_to_stop_gives_its_jobs_back_and_exits_0(queue, start_process):
    worker = await start_process("--drain-s", "0", "--worker-id", "first")
    assert (worker.event["event"], worker.event["role"], worker.event["id"]) == ("serving", "worker", "first")
    assert worker.get("/healthz")[0] == worker.get("/readyz")[0] == 200
    job_id = await queue.submit(demo_job("released"))
    await until(lambda: _has_logged(queue, job_id, 10))
    _, metrics = worker.get("/metrics")
    assert "oasst_worker_claimed_jobs_total 1.0" in metrics
    assert "oasst_worker_kv_tokens_capacity 65536.0" in metrics
    assert await worker.end(signal.SIGTERM) == 0
    assert await queue.state(job_id) is JobState.WAITING
    assert (await queue.log(job_id)).end_position >= 10


async def test_a_corrupt_checkpoint_stops_the_start_with_a_sentence_that_names_the_file(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "corrupt")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    exit_code, said = await run_to_end("--model", str(folder))
    assert exit_code == 2
    assert "model.safetensors" in said.splitlines()[-1]
    assert "Traceback" not in said


async def test_an_option_that_does_not_fit_the_machine_stops_the_start_with_a_sentence_that_says_what_to_do():
    exit_code, said = await run_to_end("--model", str(DEMO), "--device", "cpu", "--kv-dtype", "fp8")
    assert exit_code == 2
    assert said.splitlines()[-1].startswith(
        "oasst_worker: --kv-dtype fp8 needs every layer on a GPU: use int8 on a CPU"
    )
    assert "Traceback" not in said


async def test_an_unknown_option_stops_the_start_with_one_sentence_on_stderr():
    assert await run_to_end("--modle", "x") == (2, "oasst_worker: unrecognized arguments: --modle x\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--model (or OASST_WORKER_MODEL) is required"),
        (
            ["--model", "x", "--redis-url", "http://x"],
            "--redis-url: must begin with redis://, rediss://, unix://, redis+sentinel://",
        ),
        (["--model", "x", "--metrics-listen", "9000"], "--metrics-listen: must be HOST:PORT"),
        (["--model", "x", "--kv-tokens", "0"], "--kv-tokens: Input should be greater than or equal to 1"),
        (["--model", "x", "--dtype", "int8"], "--dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        (["--model", "x", "--log-format", "JSON"], "--log-format: Input should be 'text' or 'json'"),
    ],
)
def test_a_bad_option_is_named_in_a_sentence(arguments, sentence):
    with pytest.raises(StartError) as error:
        read_settings(arguments)
    assert sentence in str(error.value)


def test_a_mistyped_variable_is_named_with_the_one_that_was_meant(monkeypatch):
    monkeypatch.setenv("OASST_WORKER_MAX_SEQUENCE", "64")
    monkeypatch.setenv("OASST_WORKER_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(StartError, match="MAX_SEQUENCE is no option; did you mean OASST_WORKER_MAX_SEQUENCES"):
        read_settings(["--model", "x"])
    monkeypatch.delenv("OASST_WORKER_MAX_SEQUENCE")
    read_settings(["--model", "x"])
    assert unread_variables() == ["OASST_WORKER_SERVICE_HOST"]


class ScriptedWorker:
    """A worker on a scripted engine, in this process."""

    def __init__(self, valkey_url: str, *, ranks=None, **settings) -> None:
        self.executor = ScriptedExecutor()
        model = ServedModel(MODEL, make_engine(self.executor), make_intake(), ranks)
        registry = CollectorRegistry()
        health = WorkerHealth(silence_limit_s=60)
        options = {"model": "none", "redis_url": valkey_url, "_cli_parse_args": False} | settings
        self.worker = Worker(WorkerSettings(**options), model, registry, health, NO_TRACER)
        self.server = ProbeServer("127.0.0.1:0", health, registry)

    def check(self, path: str) -> tuple[int, dict[str, object]]:
        status, body = get(self.server.address, path)
        return status, json.loads(body)

    def close(self) -> None:
        self.executor.allow(float("inf"))
        self.server.close()
        assert self.worker.join_engine(timeout_s=10)


@pytest.fixture
def make_scripted(valkey_url: str):
    workers: list[ScriptedWorker] = []

    def make(**settings) -> ScriptedWorker:
        workers.append(ScriptedWorker(valkey_url, **settings))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def submit_now(valkey_url: str, job: Job) -> None:
    async def submit() -> None:
        redis = connect(valkey_url)
        await Queue(QueueClient(redis)).submit(job)
        await redis.aclose()

    asyncio.run(submit())


class ArmedAfterTwoSteps(StepWatchdog):
    """Leaves the first two steps alone, however slow the machine is."""

    @property
    def limit_s(self) -> float:
        return super().limit_s if len(self._recent_s) >= 2 else math.inf


def test_a_step_that_does_not_end_ends_the_worker_with_a_line_that_says_so(
    make_scripted, valkey_url, monkeypatch, capfd
):
    monkeypatch.setattr("oasst_worker.worker.StepWatchdog", ArmedAfterTwoSteps)
    scripted = make_scripted(step_limit_s=0.3)
    scripted.executor.allow(2)
    submit_now(valkey_url, make_job("stuck"))
    assert serve(scripted.worker, scripted.server) == 1
    last_line = capfd.readouterr().err.splitlines()[-1]
    assert last_line.startswith("oasst_worker: EngineStalledError: step 3 has not ended after ")
    assert "--step-limit-s" in last_line


def test_an_engine_that_fails_ends_the_worker_with_a_line_that_says_so(make_scripted, valkey_url, capfd):
    scripted = make_scripted()
    scripted.executor.failure = RuntimeError("CUDA error: device-side assert")
    submit_now(valkey_url, make_job("doomed"))
    assert serve(scripted.worker, scripted.server) == 1
    last_line = capfd.readouterr().err.splitlines()[-1]
    assert last_line == "oasst_worker: RuntimeError: CUDA error: device-side assert"


def test_a_queue_that_does_not_answer_ends_the_start_with_a_line_that_says_so(make_scripted, tmp_path, capfd):
    scripted = make_scripted(redis_url=f"unix://{tmp_path}/nobody.sock", redis_wait_s=0)
    assert serve(scripted.worker, scripted.server) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("oasst_worker: Redis: ")


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Handlers that a test leaves do not stay."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_a_worker_tells_of_its_process_while_it_loads_and_hears_no_signal_once_it_has_served(tmp_path, monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    pages, handlers = [], []

    def load(settings: WorkerSettings) -> ServedModel:
        pages.append(get(address, "/metrics")[1])
        return ServedModel(MODEL, make_engine(ScriptedExecutor()), make_intake(), None)

    def note_handlers() -> None:
        handlers.extend(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT))

    monkeypatch.setattr("oasst_worker.__main__.log_to_stderr", lambda **options: None)
    monkeypatch.setattr(type(NO_TRACER), "close", lambda tracer: note_handlers())
    nobody = f"unix://{tmp_path}/nobody.sock"
    options = ["--model", "x", "--redis-url", nobody, "--redis-wait-s", "0", "--metrics-listen", address]
    assert main(options, load=load) == 1
    assert "process_start_time_seconds" in pages[0]
    assert handlers == [signal.SIG_IGN] * 2


@pytest.mark.parametrize("is_stuck", [True, False])
def test_ranks_are_killed_before_they_are_closed_if_the_engine_is_stuck(valkey_url, is_stuck):
    calls: list[str] = []
    ranks = SimpleNamespace(kill=lambda: calls.append("kill"), close=lambda: calls.append("close"))
    scripted = ScriptedWorker(valkey_url, ranks=ranks)
    scripted.worker._loop = SimpleNamespace(join=lambda timeout_s: not is_stuck)
    assert scripted.worker.join_engine(0) is not is_stuck
    assert calls == (["kill", "close"] if is_stuck else ["close"])
    scripted.server.close()


async def test_a_worker_shows_its_load_and_its_readiness(make_scripted, queue, valkey, capfd):
    scripted = make_scripted(worker_id="scripted-1")
    assert scripted.check("/readyz") == (503, {"ok": False, "reason": "starting"})
    serving = asyncio.create_task(scripted.worker.serve(metrics_address=scripted.server.address))
    scripted.executor.allow(3)
    job_id = await queue.submit(make_job("shown"))
    await until(lambda: _is_told_running(queue))
    assert scripted.check("/healthz") == (200, {"ok": True, "reason": "in progress"})
    assert scripted.check("/readyz") == (200, {"ok": True, "reason": "serving"})
    assert json.loads(capfd.readouterr().out)["metrics"] == scripted.server.address

    valkey.pause()
    await until(lambda: scripted.check("/readyz") == (503, {"ok": False, "reason": "the queue is away"}))
    assert scripted.check("/healthz")[0] == 200
    valkey.resume()
    await until(lambda: scripted.check("/readyz")[0] == 200)

    scripted.executor.allow(float("inf"))
    assert choice_text(await queue.ended(job_id)) == expected_text(job_id, 16)
    os.kill(os.getpid(), signal.SIGTERM)
    await serving


async def _is_told_running(queue: Queue) -> bool:
    statuses = [status for status, _ in (await queue.client.load(MODEL)).workers]
    return [(status.worker_id, status.model, status.running_sequences) for status in statuses] == [
        ("scripted-1", MODEL, 1)
    ]


def test_liveness_ends_when_the_event_loop_or_a_step_is_stuck():
    now_s = 100.0
    health = WorkerHealth(silence_limit_s=5, clock=lambda: now_s)
    assert health.liveness().ok
    health.record_readiness(None)
    health.record_progress(step_stuck_s=1, step_limit_s=20)
    assert health.readiness().ok
    health.record_progress(step_stuck_s=21, step_limit_s=20)
    assert health.liveness().reason == "a step has been in progress for 21.0 s"
    health.record_progress(step_stuck_s=0, step_limit_s=20)
    now_s += 6
    assert health.liveness().reason == "the event loop has been silent for 6.0 s"
    assert not health.readiness().ok


async def test_a_killed_rank_ends_its_worker_and_another_goes_on_with_the_same_text(queue, start_process):
    split = await start_process("--split", "tensor", "--num-ranks", "2", "--worker-id", "split")
    (rank,) = psutil.Process(split.process.pid).children()
    job_id = await queue.submit(demo_job("resumed"))
    await until(lambda: _has_logged(queue, job_id, 20))
    rank.kill()
    assert await asyncio.to_thread(split.process.wait, 10) == 1
    assert 20 <= (await queue.log(job_id)).end_position < 250
    await queue.lose_lease(job_id)

    await start_process()
    resumed = await queue.ended(job_id)
    undisturbed = await queue.ended(await queue.submit(demo_job("undisturbed")))
    assert resumed.end_position == 250
    assert choice_text(resumed) == choice_text(undisturbed)


async def test_no_rank_outlives_a_killed_worker(start_process):
    split = await start_process("--split", "tensor", "--num-ranks", "2")
    (rank,) = psutil.Process(split.process.pid).children()
    await split.end(signal.SIGKILL)
    await until(lambda: _has_ended(rank))


async def _has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
