"""Alerts and dashboards ask for what there is, and every alert has its runbook and its cases."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helm_release import CHART
from prometheus_client import generate_latest

from observe.dashboards import DASHBOARDS, FOLDER, render
from observe.metrics_table import PAGE, render_page
from observe.queries import RULES, declared_metrics, names_in, read_rules, series_of

ROOT = Path(__file__).parents[2]
RUNBOOKS = ROOT / "docs" / "operations" / "runbooks.md"
CASES = Path(__file__).parent / "rules.test.yaml"

# What redis_exporter and Prometheus itself tell.
FOREIGN = {
    "up",
    "redis_aof_delayed_fsync",
    "redis_aof_last_bgrewrite_status",
    "redis_aof_last_write_status",
    "redis_commands_processed_total",
    "redis_connected_slaves",
    "redis_evicted_keys_total",
    "redis_master_link_up",
    "redis_memory_max_bytes",
    "redis_memory_used_bytes",
}
# What is refused to one tenant while others have room.
OF_ONE_TENANT = {"TENANT_LIMIT", "TOO_MUCH_TEXT"}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on PATH: apt-get install prometheus")
ALERTS = [rule.name for rule in read_rules() if rule.is_alert]


def queries() -> list[tuple[str, str]]:
    """Every query that is shipped, with where it stands."""
    of_rules = [(rule.name, rule.expr) for rule in read_rules()]
    of_panels = [
        (f"{dashboard.name}: {panel.title}", query.expr.replace("$__rate_interval", "1m"))
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for query in panel.queries
    ]
    scaled = (CHART / "templates" / "worker" / "scaledobject.yaml").read_text()
    scaler = re.search(r"query: >-\n(.*?)\n +threshold", scaled, re.DOTALL)[1]
    return [*of_rules, *of_panels, ("scaledobject", re.sub(r"{{.*?}}", "x", scaler))]


@pytest.mark.parametrize(("place", "expr"), queries(), ids=[place for place, _ in queries()])
def test_every_query_asks_for_metrics_that_exist(place: str, expr: str) -> None:
    metrics = [metric for part in ("gateway", "worker") for metric in declared_metrics(part).collect()]
    declared = {name for metric in metrics for name in series_of(metric)}
    recorded = {rule.name for rule in read_rules() if not rule.is_alert}
    asked = {name for name, _ in names_in(expr)}
    assert asked
    assert asked <= declared | recorded | FOREIGN, place


def test_a_bucket_that_is_asked_for_exists() -> None:
    bounds: dict[str, set[str]] = {}
    for part in ("gateway", "worker"):
        for metric in declared_metrics(part).collect():
            for sample in metric.samples:
                if "le" in sample.labels:
                    bounds.setdefault(sample.name, set()).add(sample.labels["le"])
    for place, expr in queries():
        for name, labels in names_in(expr):
            assert "le" not in labels or labels["le"] in bounds[name], place


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    written = re.findall(r"^### (\w+)$", RUNBOOKS.read_text(), re.MULTILINE)
    assert written == ALERTS
    for rule in read_rules():
        if rule.is_alert:
            assert rule.annotations["runbook"] == f"docs/operations/runbooks.md#{rule.name.lower()}"


def test_whatever_is_refused_for_want_of_room_is_told_of() -> None:
    sources = [path.read_text() for path in (ROOT / "gateway" / "oasst_gateway").glob("*.py")]
    reasons = {reason for source in sources for reason in re.findall(r'[rR]efused(?:Error)?\(\s*"([A-Z_]+)"', source)}
    assert reasons > OF_ONE_TENANT
    [rule] = [rule for rule in read_rules() if rule.name == "OasstRefusesWork"]
    [asked] = [labels["reason"] for _, labels in names_in(rule.expr) if "reason" in labels]
    assert set(asked.split("|")) == reasons - OF_ONE_TENANT | {"NO_WORKER"}


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    cases = yaml.safe_load(CASES.read_text())["tests"]
    samples = [sample for case in cases for test in case["promql_expr_test"] for sample in test["exp_samples"]]
    fired = {match[1] for sample in samples if (match := re.search(r'alertname="(\w+)"', sample["labels"]))}
    assert fired == set(ALERTS)


def test_no_alert_is_silent_for_want_of_what_it_asks() -> None:
    """In the healthy case, where all are silent, there is every series that any of them asks for."""
    healthy = yaml.safe_load(CASES.read_text())["tests"][0]
    assert {"expr": "ALERTS", "eval_time": "7h", "exp_samples": []} in healthy["promql_expr_test"]
    given = {series["series"].partition("{")[0] for series in healthy["input_series"]}
    rules = {rule.name: rule for rule in read_rules()}

    def measured(expr: str) -> set[str]:
        """What the query asks for, through recorded series down to what is scraped."""
        names = {name for name, _ in names_in(expr)}
        return {each for name in names for each in (measured(rules[name].expr) if name in rules else {name})}

    assert {name: missing for name in ALERTS if (missing := measured(rules[name].expr) - given)} == {}


@needs_promtool
def test_alerts_fire_when_they_should_and_are_silent_otherwise() -> None:
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(CASES)]):
        checked = subprocess.run([str(PROMTOOL), *command], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=[dashboard.name for dashboard in DASHBOARDS])
def test_the_dashboards_in_the_chart_are_as_their_panels_say(dashboard) -> None:
    written = json.loads((FOLDER / f"{dashboard.name}.json").read_text())
    assert written == render(dashboard), "run `make generated`"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=[dashboard.name for dashboard in DASHBOARDS])
def test_a_panel_shows_one_release_of_one_namespace(dashboard) -> None:
    written = json.loads((FOLDER / f"{dashboard.name}.json").read_text())
    exprs = [target["expr"] for panel in written["panels"] for target in panel["targets"]]
    selectors = [labels for expr in exprs for _, labels in names_in(expr.replace("$__rate_interval", "1m"))]
    assert {(labels.get("namespace"), labels.get("release")) for labels in selectors} == {("$namespace", "$release")}
    assert [variable["name"] for variable in written["templating"]["list"]] == ["datasource", "namespace", "release"]


def test_the_table_of_metrics_is_as_the_code_declares() -> None:
    assert PAGE.read_text() == render_page(), "run `make generated`"


@needs_promtool
@pytest.mark.parametrize("component", ["gateway", "worker"])
def test_metrics_are_named_as_prometheus_wants_them(component: str) -> None:
    exposed = generate_latest(declared_metrics(component))
    checked = subprocess.run([str(PROMTOOL), "check", "metrics"], input=exposed, capture_output=True)
    assert checked.returncode == 0, checked.stderr.decode()
