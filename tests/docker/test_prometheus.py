"""Prometheus: the rules, the adapter's queries and the dashboard ask for what is served, and say what they should.

`promtool` evaluates the rules and queries on made-up series (docker marker: it comes from Debian's package).
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
RULES = DOCKER / "prometheus-rules.yml"
ADAPTER = DOCKER / "kubernetes" / "base" / "prometheus-adapter-values.yaml"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "gmconv.json"
SCRAPE_SECONDS = 60
"""The default interval of Prometheus and of its chart: the longest that the queries must bear."""
SERVER = 'instance="a",model="m",version="1"'


def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    return found


def adapter_rules() -> dict[str, dict[str, Any]]:
    return {rule["name"]["as"]: rule for rule in yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]}


def served_metrics() -> set[str]:
    source = (ROOT / "runtime" / "serve" / "observe" / "metrics.py").read_text()
    names = set(re.findall(r'"((?:nv|gmconv)_\w+)"', source))
    return names | {f"{n}{s}" for n in names for s in ("_bucket", "_sum", "_count")}


def used_metrics(text: str) -> set[str]:
    return set(re.findall(r"\b(?:nv|gmconv)_[a-z0-9_]+", text))


def test_the_dashboard_and_the_rules_ask_only_for_metrics_that_are_served() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    assert len(expressions) > 10
    queries = [rule[key] for rule in adapter_rules().values() for key in ("metricsQuery", "seriesQuery")]
    for text in [*expressions, *(r["expr"] for r in rules()), *queries]:
        assert used_metrics(text) <= served_metrics(), text
        assert text.count("(") == text.count(")")
    recorded = {r["record"] for r in rules() if "record" in r}
    alerts = " ".join(r["expr"] for r in rules() if "alert" in r)
    assert set(re.findall(r"gmconv:[\w:]+", alerts)) == recorded


def test_every_rate_holds_two_samples_at_the_default_scrape_interval() -> None:
    """One sample has no rate: the autoscaler would read the query's fallback, 0, for ever."""
    texts = [*(r["expr"] for r in rules()), *(rule["metricsQuery"] for rule in adapter_rules().values())]
    windows = re.findall(r"rate\([^\[]*\[(\w+)\]", " ".join(texts))
    assert len(windows) > 5
    assert all(re.fullmatch(r"\d+m", w) and int(w[:-1]) * 60 >= 2 * SCRAPE_SECONDS for w in windows), windows


def test_the_dashboard_is_provisioned_and_its_panels_do_not_overlap() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    provisioned = DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    (source,) = yaml.safe_load(provisioned.read_text())["datasources"]
    assert {p["datasource"]["uid"] for p in dashboard["panels"]} == {source["uid"]}
    assert len({p["id"] for p in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [
        (x, y)
        for p in dashboard["panels"]
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_prometheus_scrapes_the_port_that_the_image_exposes() -> None:
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == ["serve:8002"]
    assert "EXPOSE 8000 8001 8002" in (DOCKER / "Dockerfile").read_text()


def evaluate(
    promtool: str, folder: Path, series: dict[str, str], expected: dict[str, dict[str, float]], at: str
) -> None:
    """`promtool test rules`: `series` (values a minute apart) and our rules; at `at`, each query yields `expected`."""
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": f"{SCRAPE_SECONDS}s",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {"expr": e, "eval_time": at, "exp_samples": [{"labels": k, "value": v} for k, v in found.items()]}
                    for e, found in expected.items()
                ],
            }
        ],
    }
    path = folder / "test.yml"
    path.write_text(yaml.safe_dump(test))
    done = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def requests(labels: str, per_minute: dict[str, int]) -> dict[str, str]:
    """The counters of one server: `per_minute` successes and failures by reason (0 for those not named)."""
    counts = dict.fromkeys(("REJECTED", "CANCELED", "BACKEND", "OTHER"), 0) | per_minute
    success = {f"nv_inference_request_success{{{labels}}}": f"0+{counts.pop('success', 0)}x40"}
    return success | {
        f'nv_inference_request_failure{{{labels},reason="{reason}"}}': f"0+{count}x40"
        for reason, count in counts.items()
    }


def alerts(*names: str) -> dict[str, dict[str, float]]:
    """Exactly these fire."""
    return {'count by (alertname) (ALERTS{alertstate="firing"})': {f'{{alertname="{n}"}}': 1.0 for n in names}}


@pytest.mark.docker
@pytest.mark.parametrize(
    ("per_minute", "firing"),
    [
        ({"success": 560, "REJECTED": 440}, ["GmconvRejected"]),
        ({"success": 560, "OTHER": 220, "CANCELED": 220}, []),
        ({"success": 900, "BACKEND": 100}, ["GmconvFailures"]),
        ({"success": 1000, "REJECTED": 5, "BACKEND": 5}, []),
        ({}, []),
    ],
    ids=["overload", "clients", "engine", "a few", "idle"],
)
def test_an_alert_names_whose_fault_it_is(
    promtool: str, tmp_path: Path, per_minute: dict[str, int], firing: list[str]
) -> None:
    evaluate(promtool, tmp_path, requests(SERVER, per_minute), alerts(*firing), "20m")


@pytest.mark.docker
@pytest.mark.parametrize(
    ("ready", "up", "at", "firing"),
    [
        ("_x15 1x25", "0x15 1x25", "14m", []),
        ("_x15 1x25", "0x15 1x25", "20m", []),
        ("_x40", "0x40", "25m", ["GmconvNotStarted"]),
        ("0x40", "1x40", "25m", ["GmconvNotStarted"]),
        ("1x10 0x30", "1x40", "13m", ["GmconvNotReady"]),
        ("1x10 stale _x30", "1x10 0x30", "13m", ["GmconvNotReady"]),
        ("1x40", "1x40", "25m", []),
    ],
    ids=["building", "built", "never started", "never ready", "not ready any more", "gone", "ready"],
)
def test_the_first_engine_build_raises_no_alert_and_a_lost_server_does_at_once(
    promtool: str, tmp_path: Path, ready: str, up: str, at: str, firing: list[str]
) -> None:
    job = 'job="gmconv-serve",instance="a"'
    evaluate(promtool, tmp_path, {f"gmconv_serve_ready{{{job}}}": ready, f"up{{{job}}}": up}, alerts(*firing), at)


@pytest.mark.docker
def test_the_autoscaler_reads_queue_time_and_rejections_at_the_default_scrape_interval(
    promtool: str, tmp_path: Path
) -> None:
    """One pod under overload, one idle, one serving within its capacity: what prometheus-adapter would answer."""
    series: dict[str, str] = {}
    traffic = {"full": {"success": 560, "REJECTED": 440}, "idle": {}, "busy": {"success": 1000}}
    wait = {"full": 560 * 5000, "idle": 0, "busy": 1000 * 1100}
    for pod, per_minute in traffic.items():
        labels = f'namespace="n",pod="{pod}",model="m",version="1"'
        series |= requests(labels, per_minute)
        series[f"nv_inference_queue_duration_us{{{labels}}}"] = f"0+{wait[pod]}x40"
        series[f"nv_inference_pending_request_count{{{labels}}}"] = "3x40"
    queries = {
        name: rule["metricsQuery"]
        .replace("<<.LabelMatchers>>", 'namespace="n",pod=~"full|idle|busy"')
        .replace("<<.GroupBy>>", "pod")
        for name, rule in adapter_rules().items()
    }
    microseconds, ratio = queries["gmconv_queue_time_us"], queries["gmconv_rejected_ratio"]
    expected = {
        f"round({microseconds})": {'{pod="full"}': 5000.0, '{pod="idle"}': 0.0, '{pod="busy"}': 1100.0},
        f"round(100 * ({ratio}))": {'{pod="full"}': 44.0, '{pod="idle"}': 0.0, '{pod="busy"}': 0.0},
    }
    evaluate(promtool, tmp_path, series, expected, "10m30s")  # between two scrapes
