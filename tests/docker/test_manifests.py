"""Dockerfile, compose file, Kubernetes and KServe manifests: valid by their schemas, consistent with the server."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
KUBERNETES = DOCKER / "kubernetes"
BASE = KUBERNETES / "base"
GPU = KUBERNETES / "overlays" / "gpu"
BIN = Path(sys.executable).parent
NOT_CORE = {"Kustomization", "InferenceService"}


def documents(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def core_files() -> list[Path]:
    files = [*BASE.glob("*.yaml"), *GPU.glob("[!d]*.yaml")]  # the deployment patch is validated merged
    return sorted(f for f in files if {d.get("kind") for d in documents(f)}.isdisjoint({*NOT_CORE, None}))


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = BIN / name if (BIN / name).exists() else Path(shutil.which(name) or name)
    return subprocess.run([str(command), *map(str, arguments)], capture_output=True, text=True, check=False)


def kubernetes_validate(path: Path) -> None:
    """`kubernetes-validate --strict`, in this process. Raises ValidationError."""
    import kubernetes_validate as validator

    for document in documents(path):
        validator.validate(document, validator.latest_version(), strict=True)


def strategic_merge(base: Any, patch: Any) -> Any:
    """The part of Kubernetes' strategic merge that the overlay uses: maps by key, null deletes, named lists by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = {k: v for k, v in base.items() if not (k in patch and patch[k] is None)}
        for key, value in patch.items():
            if value is not None:
                merged[key] = strategic_merge(merged[key], value) if key in merged else value
        return merged
    named = isinstance(base, list) and isinstance(patch, list) and all("name" in i for i in [*base, *patch] if i)
    if named and all(isinstance(i, dict) for i in [*base, *patch]):
        ours = {i["name"]: i for i in patch}
        kept = [strategic_merge(i, ours.pop(i["name"])) if i["name"] in ours else i for i in base]
        return [*kept, *ours.values()]
    return patch


def deployment(*, gpu: bool = False) -> dict[str, Any]:
    (base,) = documents(BASE / "deployment.yaml")
    if not gpu:
        return base
    (patch,) = documents(GPU / "deployment-patch.yaml")
    merged: dict[str, Any] = strategic_merge(copy.deepcopy(base), patch)
    return merged


def test_the_dockerfile_is_hadolint_clean() -> None:
    done = tool("hadolint", DOCKER / "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_shell_scripts_parse() -> None:
    for script in DOCKER.glob("*.sh"):
        assert subprocess.run(["sh", "-n", script], check=False).returncode == 0


def test_the_compose_file_fits_the_compose_specification() -> None:
    """check-jsonschema --builtin-schema vendor.compose-spec, in this process."""
    schema = get_builtin_schema("vendor.compose-spec")
    (compose,) = documents(DOCKER / "compose.yaml")
    jsonschema.validate(compose, schema)
    compose["services"]["serve"]["read_olny"] = True
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(compose, schema)


def test_the_compose_file_reserves_a_gpu_and_mounts_what_exists() -> None:
    (compose,) = documents(DOCKER / "compose.yaml")
    (device,) = compose["services"]["serve"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    for service in compose["services"].values():
        for volume in service["volumes"]:
            if isinstance(volume, str) and volume.startswith("./"):
                assert (DOCKER / volume.split(":")[0]).exists(), volume
    assert compose["services"]["serve"]["read_only"] is True
    assert set(compose["volumes"]) >= {"engine-cache"}


@pytest.mark.parametrize("path", core_files(), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_each_kubernetes_object_is_strictly_valid(path: Path) -> None:
    kubernetes_validate(path)


def test_the_gpu_overlay_merges_into_a_valid_deployment(tmp_path: Path) -> None:
    merged = deployment(gpu=True)
    path = tmp_path / "deployment.yaml"
    path.write_text(yaml.safe_dump(merged))
    kubernetes_validate(path)
    spec = merged["spec"]["template"]["spec"]
    cache = next(v for v in spec["volumes"] if v["name"] == "engine-cache")
    assert cache == {"name": "engine-cache", "persistentVolumeClaim": {"claimName": "gmconv-engine-cache"}}
    (server,) = spec["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert server["securityContext"]["readOnlyRootFilesystem"] is True, "the patch keeps what it does not name"


def test_strict_validation_would_catch_a_misspelt_field(tmp_path: Path) -> None:
    broken = tmp_path / "deployment.yaml"
    broken.write_text((BASE / "deployment.yaml").read_text().replace("readinessProbe", "readynessProbe"))
    with pytest.raises(Exception, match="readynessProbe"):
        kubernetes_validate(broken)


def test_each_kustomization_lists_every_file_and_only_files_that_exist() -> None:
    for folder in (BASE, GPU):
        (kustomization,) = documents(folder / "kustomization.yaml")
        named = {*kustomization["resources"], *(p["path"] for p in kustomization.get("patches", []))}
        for name in named:
            assert (folder / name).exists(), name
        objects = {f.name for f in folder.glob("*.yaml")} - {"kustomization.yaml", "prometheus-adapter-values.yaml"}
        assert objects <= named


def test_the_overlay_renames_the_image_that_the_base_leaves() -> None:
    """kustomize applies the overlay's `images` to what the base made: a new name there would leave the cpu tag here."""
    (server,) = deployment(gpu=True)["spec"]["template"]["spec"]["containers"]
    image = server["image"]
    for folder in (BASE, GPU):
        (entry,) = documents(folder / "kustomization.yaml")[0]["images"]
        assert entry["name"] == image.split(":")[0]
        image = f"{entry.get('newName', entry['name'])}:{entry['newTag']}"
    assert image.endswith(":tensorrt")


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_the_pod_is_hardened_and_its_probes_ask_the_protocol(gpu: bool) -> None:
    spec = deployment(gpu=gpu)["spec"]["template"]["spec"]
    (server,) = spec["containers"]
    assert spec["securityContext"]["runAsUser"] == 10001
    assert "USER 10001:10001" in (DOCKER / "Dockerfile").read_text()
    assert server["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert server["securityContext"]["allowPrivilegeEscalation"] is False
    paths = {probe: server[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {
        "startupProbe": "/v2/health/ready",
        "livenessProbe": "/v2/health/live",
        "readinessProbe": "/v2/health/ready",
    }
    assert server["resources"]["requests"]["cpu"] == server["resources"]["limits"]["cpu"]


def test_the_grace_period_covers_prestop_and_drain() -> None:
    for gpu in (False, True):
        spec = deployment(gpu=gpu)["spec"]["template"]["spec"]
        (server,) = spec["containers"]
        drain = float(server["args"][server["args"].index("--drain-timeout") + 1])
        sleep = float(re.search(r"sleep\((\d+)\)", " ".join(server["lifecycle"]["preStop"]["exec"]["command"]))[1])  # type: ignore[index]
        assert spec["terminationGracePeriodSeconds"] > drain + sleep


def test_selectors_ports_and_claims_agree() -> None:
    spec = deployment()["spec"]
    labels = spec["template"]["metadata"]["labels"]
    (service,) = documents(BASE / "service.yaml")
    (budget,) = documents(BASE / "poddisruptionbudget.yaml")
    (policy,) = documents(BASE / "networkpolicy.yaml")
    (scaler,) = documents(BASE / "horizontalpodautoscaler.yaml")
    selectors = [
        spec["selector"]["matchLabels"], service["spec"]["selector"], budget["spec"]["selector"]["matchLabels"],
        policy["spec"]["podSelector"]["matchLabels"],
    ]  # fmt: skip
    assert all(selector.items() <= labels.items() for selector in selectors)
    (server,) = spec["template"]["spec"]["containers"]
    assert {p["targetPort"] for p in service["spec"]["ports"]} == {p["name"] for p in server["ports"]}
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment()["metadata"]["name"]
    assert "replicas" not in spec
    adapter = (BASE / "prometheus-adapter-values.yaml").read_text()
    assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] in adapter
    assert budget["spec"]["maxUnavailable"] < scaler["spec"]["minReplicas"]


def test_the_arguments_in_every_manifest_are_the_servers() -> None:
    from runtime.serve.__main__ import main

    (custom,) = documents(KUBERNETES / "kserve" / "custom.yaml")
    (compose,) = documents(DOCKER / "compose.yaml")
    commands = [
        deployment()["spec"]["template"]["spec"]["containers"][0]["args"],
        deployment(gpu=True)["spec"]["template"]["spec"]["containers"][0]["args"],
        custom["spec"]["predictor"]["containers"][0]["args"],
        compose["services"]["serve"]["command"],
    ]
    for arguments in commands:
        main.make_context("serve", list(arguments))  # a usage error would raise


@pytest.mark.parametrize("name", ["triton", "custom"])
def test_the_inference_service_fits_kserves_schema(name: str) -> None:
    schema = json.loads(Path(__file__).with_name("kserve.schema.json").read_text())
    text = (KUBERNETES / "kserve" / f"{name}.yaml").read_text()
    jsonschema.validate(yaml.safe_load(text), schema)
    for field in ("minReplicas:", "resources:", "limits:"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(text.replace(field, "x" + field)), schema)


def test_kserves_own_limits_are_overridden() -> None:
    (service,) = documents(KUBERNETES / "kserve" / "triton.yaml")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == "kserve-tritonserver"
    assert model["resources"]["limits"] != {"cpu": "1", "memory": "2Gi"}
    assert model["resources"]["limits"]["nvidia.com/gpu"] == "1"


def served_metrics() -> set[str]:
    source = (ROOT / "runtime" / "serve" / "metrics.py").read_text()
    names = set(re.findall(r'"((?:nv|gmconv)_\w+)"', source))
    return names | {f"{n}{s}" for n in names for s in ("_bucket", "_sum", "_count")}


def used_metrics(text: str) -> set[str]:
    return set(re.findall(r"\b(?:nv|gmconv)_[a-z0-9_]+", text))


def test_the_dashboard_and_the_rules_ask_only_for_metrics_that_are_served() -> None:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "gmconv.json").read_text())
    expressions = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    assert len(expressions) > 10
    rules = documents(DOCKER / "prometheus-rules.yml")[0]["groups"][0]["rules"]
    adapter = documents(BASE / "prometheus-adapter-values.yaml")[0]["rules"]["custom"][0]
    for text in [*expressions, *(r["expr"] for r in rules), adapter["metricsQuery"], adapter["seriesQuery"]]:
        assert used_metrics(text) <= served_metrics(), text
        assert text.count("(") == text.count(")")
    recorded = {r["record"] for r in rules if "record" in r}
    alerts = " ".join(r["expr"] for r in rules if "alert" in r)
    assert set(re.findall(r"gmconv:[\w:]+", alerts)) <= recorded


def test_the_dashboard_is_provisioned_and_its_panels_do_not_overlap() -> None:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "gmconv.json").read_text())
    (source,) = documents(DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")[0]["datasources"]
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
    (config,) = documents(DOCKER / "prometheus.yml")
    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == ["serve:8002"]
    assert "EXPOSE 8000 8001 8002" in (DOCKER / "Dockerfile").read_text()


def test_nothing_but_what_is_named_reaches_a_build() -> None:
    lines = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "*"
    copied = set(re.findall(r"^COPY (?!--from)(?:\S+ )*?(\S+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE))
    allowed = [x[1:].removesuffix("/**") for x in lines if x.startswith("!")]
    for source in copied:
        pattern = source.replace("${EXTRAS}", "*").replace("LICENSE*", "LICENSE")
        assert any(Path(pattern).match(a) or pattern == a or Path(pattern.replace("*", "x")).match(a) for a in allowed)
