"""Processes are kept running, and not one outlives its supervisor."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress

import psutil
import pytest
from oasst_cli.up.child import Announcement, Child
from oasst_cli.up.supervisor import Keeper, RestartPolicy, Service, ServiceFailedError, keep_running

SERVE = """
import json, os, sys, time
print(json.dumps({"event": "serving", "id": str(os.getpid()), "listen": "127.0.0.1:7"}), flush=True)
"""
POLICY = RestartPolicy(first_delay_s=0.01, max_delay_s=0.05)


class Diary:
    """An observer that writes down what it hears."""

    def __init__(self):
        self.served_names = []
        self.deaths = []
        self.news = asyncio.Event()

    def served(self, name, announcement):
        self.served_names.append(name)
        self.news.set()

    def died(self, name, reason, restart_in_s):
        self.deaths.append(reason)

    async def wait_for_served(self, count):
        while len(self.served_names) < count:
            self.news.clear()
            await self.news.wait()


@pytest.fixture
def diary():
    return Diary()


@pytest.fixture
def keeper_of(tmp_path, diary):
    """Makes the keeper of a Python program."""

    def make(code, *, name="fake", grace_s=5.0, command=None):
        argv = [sys.executable, "-c", textwrap.dedent(code)]
        service = Service(name=name, role="fake", command=command or (lambda before: argv), grace_s=grace_s)
        return Keeper(service, log_dir=tmp_path, observer=diary, policy=POLICY)

    return make


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until_gone(pid):
    """Another's child cannot be waited for by `wait`; psutil watches it."""
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=10)


async def test_a_service_runs_inside_the_context_and_not_after_it(keeper_of):
    keeper = keeper_of(SERVE + "time.sleep(60)")
    async with keep_running([keeper]):
        announcement = await keeper.wait_until_serving()
        pid = keeper.pid
        assert announcement == Announcement(id=str(pid), listen="127.0.0.1:7")
        assert not is_gone(pid)
    assert is_gone(pid)


async def test_a_service_that_is_killed_is_started_again_and_the_reason_told(keeper_of, diary):
    keeper = keeper_of(SERVE + "time.sleep(60)")
    async with keep_running([keeper]):
        await keeper.wait_until_serving()
        first = keeper.pid
        os.kill(first, signal.SIGKILL)
        await diary.wait_for_served(2)
        assert keeper.pid != first
    assert diary.deaths == ["was ended by SIGKILL"]


async def test_the_reason_of_a_death_is_the_last_line_of_standard_error(keeper_of, diary):
    keeper = keeper_of(SERVE + "sys.stderr.write('one\\nthe disk is full\\n\\n'); sys.exit(7)")
    async with keep_running([keeper]):
        await diary.wait_for_served(2)
    assert diary.deaths[0] == "ended with exit code 7: the disk is full"


async def test_a_service_comes_back_with_what_it_announced_before(keeper_of, diary):
    seen = []

    def command(before):
        seen.append(before and before.listen)
        return [sys.executable, "-c", SERVE + "sys.exit(1)"]

    async with keep_running([keeper_of("", command=command)]):
        await diary.wait_for_served(2)
    assert seen[:2] == [None, "127.0.0.1:7"]


async def test_a_service_that_never_serves_ends_the_run_after_three_starts(keeper_of, diary):
    keeper = keeper_of("import sys; sys.exit('there is no such port')")
    with pytest.RaisesGroup(ServiceFailedError, flatten_subgroups=True) as failures:
        async with keep_running([keeper]):
            await keeper.wait_until_serving()
    failure = failures.value.exceptions[0]
    assert str(failure) == "fake ended with exit code 1: there is no such port"
    assert not failure.is_unusable
    assert len(diary.deaths) == 2


async def test_exit_code_2_before_serving_ends_the_run_at_once(keeper_of, diary):
    keeper = keeper_of("import sys; print('unknown option --sped', file=sys.stderr); sys.exit(2)")
    with pytest.RaisesGroup(ServiceFailedError) as failures:
        async with keep_running([keeper]):
            await keeper.wait_until_serving()
    assert failures.value.exceptions[0].is_unusable
    assert diary.deaths == []


async def test_deaths_after_serving_never_end_the_run(keeper_of, diary):
    async with keep_running([keeper_of(SERVE + "sys.exit(1)")]):
        await diary.wait_for_served(5)


async def test_a_service_that_gives_up_takes_its_neighbours_with_it(keeper_of):
    neighbour = keeper_of(SERVE + "time.sleep(60)", name="neighbour")
    broken = keeper_of("import sys; sys.exit(2)", name="broken")
    with pytest.RaisesGroup(ServiceFailedError, flatten_subgroups=True):
        async with keep_running([neighbour]):
            await neighbour.wait_until_serving()
            pid = neighbour.pid
            async with keep_running([broken]):
                await broken.wait_until_serving()
    assert is_gone(pid)


async def test_a_service_that_does_not_listen_is_stopped_by_force(keeper_of):
    deaf = keeper_of(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + SERVE + "time.sleep(60)", grace_s=0.1
    )
    async with keep_running([deaf]):
        await deaf.wait_until_serving()
        pid = deaf.pid
    assert is_gone(pid)


async def test_a_second_signal_ends_a_slow_stop(keeper_of):
    deaf = keeper_of(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + SERVE + "time.sleep(60)", grace_s=60
    )
    async with asyncio.timeout(10), keep_running([deaf]):
        await deaf.wait_until_serving()
        asyncio.get_running_loop().call_later(0.1, deaf.kill)


async def test_a_cancelled_stop_leaves_no_process(tmp_path):
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + SERVE + "time.sleep(60)"
    child = await Child.start([sys.executable, "-c", code], environment={}, log=tmp_path / "log")
    await child.announcement()
    stop = asyncio.create_task(child.stop(60))
    await asyncio.sleep(0)
    stop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stop
    assert is_gone(child.pid)


async def test_what_a_dead_process_started_dies_with_it(tmp_path):
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, file=sys.stderr, flush=True)
"""
    parent = await Child.start([sys.executable, "-c", code], environment={}, log=tmp_path / "log")
    async with asyncio.timeout(10):
        assert await parent.wait() == 0
    wait_until_gone(int(parent.last_words()))


async def test_other_output_goes_to_the_log_and_does_not_stop_the_process(tmp_path):
    code = "print('one long line ' * 50_000)" + SERVE + "print('more\\n' * 50_000)"
    log = tmp_path / "log"
    child = await Child.start([sys.executable, "-c", code], environment={}, log=log)
    async with asyncio.timeout(20):
        assert (await child.announcement()).listen == "127.0.0.1:7"
        assert await child.wait() == 0
    assert log.read_text().split().count("more") == 50_000


async def test_last_words_are_those_of_this_process_not_of_the_one_before(tmp_path):
    log = tmp_path / "log"
    log.write_text("words of the one before\n")
    child = await Child.start([sys.executable, "-c", "pass"], environment={}, log=log)
    await child.wait()
    assert child.last_words() == ""


async def test_last_words_are_kept_of_a_process_that_ends_before_its_start_is_known(tmp_path, monkeypatch):
    start = asyncio.create_subprocess_exec

    async def start_and_wait(*arguments, **options):
        process = await start(*arguments, **options)
        await process.wait()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_and_wait)
    child = await Child.start([sys.executable, "-c", "exit('no')"], environment={}, log=tmp_path / "log")
    await child.wait()
    assert child.last_words() == "no"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process die with its parent")
def test_children_die_with_a_supervisor_that_is_killed(tmp_path):
    code = f"""
import asyncio, pathlib, sys
from oasst_cli.up.child import Child

async def main():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = await Child.start(command, environment={{}}, log=pathlib.Path({str(tmp_path / "log")!r}))
    print(child.pid, flush=True)
    await child.wait()

asyncio.run(main())
"""
    supervisor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with supervisor:
        child_pid = int(supervisor.stdout.readline())
        supervisor.kill()
    wait_until_gone(child_pid)


@pytest.mark.parametrize("line", [b"", b"listening\n", b"7\n", b'{"event": "starting"}\n', b"{not json\n"])
def test_only_a_serving_line_is_an_announcement(line):
    assert Announcement.from_line(line) is None


def test_delays_grow_up_to_a_bound_and_never_overflow():
    delays = [RestartPolicy().delay_s(deaths) for deaths in (1, 2, 3, 100, 100_000)]
    assert delays == [0.25, 0.5, 1.0, 10.0, 10.0]
