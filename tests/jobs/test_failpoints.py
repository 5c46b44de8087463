"""Failpoints do nothing until armed, act where and when they are told to, and know their names."""

import re
import subprocess
import sys
import time
from pathlib import Path

import oasst_gateway
import oasst_gateway.settings
import oasst_worker
import oasst_worker.settings
import pytest
from oasst_jobs import failpoints
from oasst_jobs.failpoints import Action, Failpoint, FailpointError, parse_failpoints

KNOWN = ("here", "there")


@pytest.fixture(autouse=True)
def disarm():
    yield
    failpoints.arm(())


def test_a_place_that_is_not_armed_does_nothing():
    failpoints.reach("here")
    failpoints.arm(parse_failpoints("there=fail", known=KNOWN))
    failpoints.reach("here")


def test_a_place_fails_at_the_time_that_was_named_and_at_no_other():
    failpoints.arm(parse_failpoints("here=fail@2, there=fail", known=KNOWN))
    failpoints.reach("here")
    with pytest.raises(FailpointError, match="here"):
        failpoints.reach("here")
    failpoints.reach("here")
    for _ in range(2):
        with pytest.raises(FailpointError, match="there"):
            failpoints.reach("there")


def test_a_place_hangs_for_as_long_as_it_was_told():
    failpoints.arm(parse_failpoints("here=hang:0.05", known=KNOWN))
    started_s = time.monotonic()
    failpoints.reach("here")
    assert time.monotonic() - started_s >= 0.05


def test_a_place_kills_its_process_as_kill_9_does():
    program = (
        "from oasst_jobs import failpoints;"
        "failpoints.arm([failpoints.Failpoint('here', failpoints.Action.KILL)]);"
        "failpoints.reach('here'); print('alive')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-9, "")


def test_a_list_is_read_in_full():
    assert parse_failpoints("here=kill@3,there=hang:1.5", known=KNOWN) == (
        Failpoint("here", Action.KILL, at=3),
        Failpoint("there", Action.HANG, hang_s=1.5),
    )
    assert parse_failpoints("", known=KNOWN) == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nowhere=kill", "there is no failpoint 'nowhere', only here, there"),
        ("here", "'here' is not NAME=kill"),
        ("here=explode", "'here=explode' is not NAME=kill"),
        ("here=hang", "'here=hang' is not NAME=kill"),
        ("here=hang:long", "'here=hang:long' is not NAME=kill"),
        ("here=kill:3", "'here=kill:3' is not NAME=kill"),
        ("here=kill@0", "'here=kill@0' is not NAME=kill"),
    ],
)
def test_a_bad_list_is_refused_with_a_sentence_that_names_the_item(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_failpoints(text, known=KNOWN)


@pytest.mark.parametrize("package", [oasst_gateway, oasst_worker])
def test_the_places_in_the_code_are_those_that_the_settings_know(package):
    sources = Path(package.__file__).parent.rglob("*.py")
    places = [place for source in sources for place in re.findall(r'failpoints\.reach\("(.+)"\)', source.read_text())]
    assert sorted(places) == sorted(sys.modules[f"{package.__name__}.settings"].FAILPOINTS)
