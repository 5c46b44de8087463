"""Variables that were meant to be options are told from those that others set."""

import pytest
from oasst_telemetry import unknown_variables

OPTIONS = ["model", "model_name", "listen", "metrics_listen", "redis_url", "reuse_port", "lease_s"]


def meant_by(name: str) -> str | None:
    return unknown_variables([name], prefix="APP_", options=OPTIONS)[name]


def test_options_and_what_others_read_are_left_alone() -> None:
    assert unknown_variables(["APP_MODEL", "app_lease_s", "HOME"], prefix="APP_", options=OPTIONS) == {}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("APP_MODLE", "APP_MODEL"), ("APP_LEASE", "APP_LEASE_S"), ("app_metric_listen", "APP_METRICS_LISTEN")],
)
def test_a_name_that_is_nearly_an_options_is_a_mistyped_one(name: str, meant: str) -> None:
    assert meant_by(name) == meant


@pytest.mark.parametrize(
    "name",
    [
        "SERVICE_HOST",
        "SERVICE_PORT",
        "SERVICE_PORT_METRICS",
        "PORT",
        "PORT_9464_TCP_ADDR",
        "REDIS_PORT",
        "METRICS_LISTEN_PORT",
    ],
)
def test_what_a_cluster_sets_for_services_is_nobodys_option(name: str) -> None:
    assert meant_by(f"APP_{name}") is None
