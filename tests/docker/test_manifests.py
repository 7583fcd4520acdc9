"""Dockerfile, Kubernetes and KServe manifests: valid by their schemas, consistent with the server."""

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

import gmconv
from runtime.serve.settings import Settings

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
    assert budget["spec"]["maxUnavailable"] < scaler["spec"]["minReplicas"]


def test_the_autoscaler_follows_queue_time_below_what_admission_allows_and_the_share_that_admission_sheds() -> None:
    """Queue time alone is flat under overload: the server holds it near --shed-target and rejects the rest."""
    (scaler,) = documents(BASE / "horizontalpodautoscaler.yaml")
    targets = {
        m["pods"]["metric"]["name"]: parse_quantity(m["pods"]["target"]["averageValue"])
        for m in scaler["spec"]["metrics"]
    }
    (adapter,) = documents(BASE / "prometheus-adapter-values.yaml")
    assert set(targets) == {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    assert targets["gmconv_queue_time_us"] < Settings(source=Path()).shed_target * 1e6
    assert targets["gmconv_rejected_ratio"] == 0.01


def parse_quantity(text: str) -> float:
    """A Kubernetes quantity: "3000", or "10m" in thousandths."""
    return int(text[:-1]) / 1000 if text.endswith("m") else float(text)


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


@pytest.mark.parametrize("path", [BASE / "deployment.yaml", *KUBERNETES.glob("kserve/*.yaml")], ids=lambda p: p.stem)
def test_every_pod_is_scraped_where_its_metrics_are(path: Path) -> None:
    """The annotations that Prometheus' own chart reads; KServe passes an InferenceService's on to its pods."""
    (found,) = documents(path)
    source = found["spec"]["template"] if found["kind"] == "Deployment" else found
    annotations = source["metadata"]["annotations"]
    scraped = {k.removeprefix("prometheus.io/"): v for k, v in annotations.items() if k.startswith("prometheus.io/")}
    assert scraped == {"scrape": "true", "port": "8002", "path": "/metrics"}
    if found["kind"] == "InferenceService":  # else KServe may write the port of Knative's sidecar over ours
        assert annotations["serving.kserve.io/enable-prometheus-scraping"] == "false"


@pytest.mark.parametrize("name", ["triton", "custom"])
def test_an_inference_service_runs_as_a_plain_user_without_capabilities(name: str) -> None:
    (service,) = documents(KUBERNETES / "kserve" / f"{name}.yaml")
    predictor = service["spec"]["predictor"]
    assert predictor["securityContext"]["runAsNonRoot"] is True
    assert predictor["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in predictor.get("containers", [predictor.get("model")]):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def stages() -> dict[str, str]:
    """The Dockerfile's stages: name -> text."""
    text = (DOCKER / "Dockerfile").read_text()
    parts = re.split(r"^FROM (\S+) AS (\S+)$", text, flags=re.MULTILINE)
    return {name: f"FROM {source}{body}" for source, name, body in zip(*[iter(parts[1:])] * 3, strict=True)}


def test_the_final_stage_imports_nothing_from_the_model_volume() -> None:
    """`python -m` puts the working directory, /models, before the standard library unless told not to."""
    assert "PYTHONSAFEPATH=1" in stages()["final"]


def test_the_version_label_is_the_projects() -> None:
    assert f"ARG VERSION={gmconv.__version__}\n" in stages()["final"]


def test_only_gpu_variants_ask_for_a_gpu_and_they_keep_what_the_driver_compiles() -> None:
    found = stages()
    assert not re.findall(r"^[A-Z].*", found["base-cpu"], re.MULTILINE)[1:], "it adds nothing to the base image"
    assert "NVIDIA_" not in found["final"]
    assert "NVIDIA_VISIBLE_DEVICES=all" in found["base-gpu"]
    (volume,) = json.loads(re.search(r"^VOLUME (.*)$", found["final"], re.MULTILINE)[1])  # type: ignore[index]
    assert f"CUDA_CACHE_PATH={volume}/" in found["base-gpu"]
    for variant in ("tensorrt", "rtx"):
        assert found[f"base-{variant}"].startswith("FROM base-gpu")


def test_a_new_version_of_the_project_rebuilds_no_dependency() -> None:
    """Layers are kept until something copied before them changes: the lock alone may come before the dependencies."""
    found = stages()
    chain = found["tools"] + found["dependencies"]
    copied = re.findall(r"^COPY (.+) \S+$", chain, re.MULTILINE)
    assert all(source.startswith("docker/") for source in copied), copied
    assert found["project"].startswith("FROM dependencies\n")
    layers = re.findall(r"^COPY --from=(\S+) ", found["final"], re.MULTILINE)
    assert layers == ["dependencies", "project"]


def test_nothing_but_what_is_named_reaches_a_build() -> None:
    lines = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "*"
    copied = set(re.findall(r"^COPY (?!--from)(?:\S+ )*?(\S+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE))
    allowed = [x[1:].removesuffix("/**") for x in lines if x.startswith("!")]
    for source in copied:
        pattern = source.replace("${EXTRAS}", "*").replace("LICENSE*", "LICENSE")
        assert any(Path(pattern).match(a) or pattern == a or Path(pattern.replace("*", "x")).match(a) for a in allowed)
