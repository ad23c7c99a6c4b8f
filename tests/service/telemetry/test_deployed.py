"""The dashboard and the alert rules ask for what the service tells, in PromQL that Prometheus takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from service.app import ROUTERS
from service.metrics import Metrics

ROOT = Path(__file__).parents[3]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "semid.json"
SCRAPED = {"job", "instance"}  # labels that Prometheus gives to all it scrapes
FUNCTIONS = {"and", "or", "by", "on", "sum", "max", "rate", "increase", "changes", "vector", "scalar"} | {
    "histogram_quantile",
    "max_over_time",
    "absent",
}


class Query(NamedTuple):
    """An expression, and the labels that the words beside it name."""

    where: str
    expression: str
    named: set[str]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> Iterator[Query]:
    for rule in rules():
        said = json.dumps(rule["annotations"])
        yield Query(rule["alert"], rule["expr"], set(re.findall(r"\$labels\.(\w+)", said)))
    for panel in panels():
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            yield Query(panel["title"], target["expr"].replace("$__rate_interval", "5m"), named)
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if asked := re.fullmatch(r"label_values\((\w+), (\w+)\)", str(variable.get("definition"))):
            yield Query(variable["name"], asked[1], {asked[2]})


def samples() -> dict[str, set[str]]:
    """The names of all samples that are told, and their labels."""
    metrics, found = Metrics(), {"up": set(SCRAPED)}
    for wrapper in vars(metrics).values():
        if isinstance(wrapper, MetricWrapperBase):
            labels = {*wrapper._labelnames, *SCRAPED}
            if wrapper._type == "histogram":
                found |= {f"{wrapper._name}_{end}": labels for end in ("sum", "count")}
                found[f"{wrapper._name}_bucket"] = labels | {"le"}
            else:
                found[f"{wrapper._name}_total" if wrapper._type == "counter" else wrapper._name] = labels
    process = re.findall(r"^(process_\w+) ", metrics.render().decode(), re.MULTILINE)
    return found | dict.fromkeys(process, SCRAPED)


@pytest.mark.parametrize("query", list(queries()), ids=lambda query: query.where)
def test_what_is_asked_for_is_what_the_service_tells(query: Query) -> None:
    told = samples()
    bare = re.sub(r'"[^"]*"', '""', query.expression)
    kept = re.findall(r"\b(?:by|on) \(([^)]*)\).*?([a-z]\w+_\w+)(?=[{)\[ ])(?!\()", bare, re.DOTALL)
    asked = re.findall(r"([a-z_]+)\{([^}]*)\}", bare)
    outside = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on) \([^)]*\)", " ", bare)
    names = set(re.findall(r"[a-z_]{2,}", outside)) - FUNCTIONS

    assert names
    assert names <= set(told)
    for name, matchers in asked:
        assert set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers)) <= told[name]
    for labels, name in kept:
        assert set(re.findall(r"\w+", labels)) <= told[name]
    left = {label for labels, _ in kept for label in re.findall(r"\w+", labels)}
    assert query.named <= (left or set.union(*(told[name] for name in names)))
    routes = {getattr(route, "path_format", None) for part in ROUTERS for route in part.routes}
    assert set(re.findall(r'route!?="([^"]*)"', query.expression)) <= routes


def test_the_docs_tell_of_every_rule_and_how_bad_it_is() -> None:
    table = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").split("## Alarms")[1]

    assert dict(re.findall(r"^\| `(Semid\w+)` \| (\w+) \|", table, re.MULTILINE)) == {
        rule["alert"]: rule["labels"]["severity"] for rule in rules()
    }


def test_panels_say_what_they_show_and_lie_beside_each_other() -> None:
    board = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        missing = "promtool (of the package prometheus) is not installed"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    return found


def assert_well(*command: object) -> None:
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_prometheus_takes_every_expression(promtool: str, tmp_path: Path) -> None:
    asked = [{"record": f"asked:{i}", "expr": query.expression} for i, query in enumerate(queries())]
    every = tmp_path / "every.yml"
    every.write_text(yaml.safe_dump({"groups": [{"name": "every", "rules": asked}]}).replace("asked:", "asked_"))

    assert_well(promtool, "check", "rules", RULES)
    assert_well(promtool, "check", "rules", every)


def test_alarms_go_off_when_they_should_and_not_else(promtool: str) -> None:
    assert_well(promtool, "test", "rules", Path(__file__).with_name("alerts.test.yml"))


def test_prometheus_has_nothing_to_say_against_the_metrics(promtool: str, service: Any) -> None:
    text = service.http.get("/metrics").text

    ended = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )

    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")
