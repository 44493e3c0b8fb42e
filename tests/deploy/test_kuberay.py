"""The Kubernetes manifests: valid by Kubernetes' schemas, readable by Ray itself, and safe in what they open."""

import copy
import json
import re
import shlex
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kuberay_schema import schema_of
from kustomize import Object, build
from referencing import Registry, Resource

KUBERAY = Path(__file__).resolve().parents[2] / "deploy" / "kuberay"
OVERLAYS = ("local", "gpu")
KUBERNETES = ("1.31", "1.34")
# Made by hand before `kubectl apply` (docs/cluster.md); no file holds one.
SECRETS = {"serving-keys", "tracking-secrets", "redis-secrets", "ray-secrets"}


@cache
def _built(overlay: str) -> list[Object]:
    return build(KUBERAY / "overlays" / overlay)


@cache
def _jobs() -> list[Object]:
    paths = sorted((KUBERAY / "jobs").glob("*.yaml"))
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]


def _one(overlay: str, kind: str, name: str = "pixellm") -> Object:
    [found] = [o for o in _built(overlay) if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def _pod_templates(objects: list[Object]) -> list[Object]:
    """Every pod template, wherever it is."""
    found: list[Object] = []

    def look(node: Any) -> None:
        if isinstance(node, dict):
            spec = node.get("spec")
            if isinstance(spec, dict) and "containers" in spec:
                found.append(node)
            for value in node.values():
                look(value)
        elif isinstance(node, list):
            for value in node:
                look(value)

    look(objects)
    return found


@cache
def _kuberay_validator(kind: str) -> Any:
    text = files("kubernetes_validate").joinpath(
        f"kubernetes-json-schema/v{KUBERNETES[-1]}.0-local-strict/_definitions.json"
    )
    definitions = Resource.from_contents(json.loads(text.read_text(encoding="utf-8")))
    return jsonschema.Draft202012Validator(schema_of(kind), registry=definitions @ Registry())


def test_every_manifest_is_reached_by_a_kustomization() -> None:
    objects = {(o["kind"], o["metadata"]["name"]) for o in _built("local")}
    for path in (KUBERAY / "base").glob("*.yaml"):
        for item in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if item.get("kind") not in (None, "Kustomization"):
                assert (item["kind"], item["metadata"]["name"]) in objects, path


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_own_objects_are_valid_by_its_published_schemas(overlay: str, version: str) -> None:
    checked = 0
    for item in _built(overlay):
        if not item["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(item, version, strict=True)
            checked += 1
    assert checked > 20


def test_kubernetes_schema_would_catch_a_misspelt_key() -> None:
    wrong = copy.deepcopy(_one("local", "Deployment", "mlflow"))
    wrong["spec"]["template"]["spec"]["containers"][0]["commnd"] = ["mlflow"]
    with pytest.raises(kubernetes_validate.ValidationError, match="commnd"):
        kubernetes_validate.validate(wrong, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_objects_hold_only_fields_that_kuberay_documents(overlay: str) -> None:
    ours = [o for o in _built(overlay) if o["apiVersion"].startswith("ray.io/")] + _jobs()
    assert sorted({o["kind"] for o in ours}) == ["RayCluster", "RayJob", "RayService"]
    for item in ours:
        _kuberay_validator(item["kind"]).validate(item)


@pytest.mark.parametrize("path", ["spec.workerGroups", "spec.headGroupSpec.template.spec.container"])
def test_a_misspelt_field_of_a_ray_object_is_caught(path: str) -> None:
    wrong = copy.deepcopy(_one("gpu", "RayCluster"))
    *parents, leaf = path.split(".")
    node = wrong
    for key in parents:
        node = node[key]
    node[leaf] = []
    with pytest.raises(jsonschema.ValidationError, match=leaf):
        _kuberay_validator("RayCluster").validate(wrong)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rays_autoscaler_reads_the_groups_as_they_are_meant(overlay: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = _derive_autoscaling_config_from_ray_cr(_one(overlay, "RayCluster"))
    nodes = cluster["available_node_types"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    assert {node["min_workers"] for node in nodes.values()} == {0}
    assert cluster["idle_timeout_minutes"] == 5
    served = _one(overlay, "RayService")
    engines = _derive_autoscaling_config_from_ray_cr(
        {"metadata": served["metadata"], "spec": served["spec"]["rayClusterConfig"]}
    )["available_node_types"]["engines"]
    assert engines["min_workers"] == 1
    if overlay == "gpu":
        assert nodes["gpu"]["resources"]["GPU"] == 8
        assert engines["resources"]["GPU"] == 1
    else:
        assert set(nodes) == {"headgroup", "data"}
        assert "GPU" not in engines["resources"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_is_the_one_of_serve_config(overlay: str, repository: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    given = yaml.safe_load(_one(overlay, "RayService")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(given)
    plain = yaml.safe_load((repository / "serve" / "config.yaml").read_text(encoding="utf-8"))
    plain["proxy_location"] = "EveryNode"
    if overlay == "gpu":
        overrides = plain["applications"][0]["args"]["overrides"]
        overrides[overrides.index("serve.replica_gpus=0")] = "serve.replica_gpus=1"
        overrides.insert(-1, "serve.dtype=bf16")
    assert given == plain


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_outlives_its_head(overlay: str) -> None:
    spec = _one(overlay, "RayService")["spec"]
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    options = spec["rayClusterConfig"]["gcsFaultToleranceOptions"]
    name, _, port = options["redisAddress"].partition(":")
    [listening] = _one(overlay, "Service", name)["spec"]["ports"]
    assert str(listening["port"]) == port
    [redis] = _one(overlay, "StatefulSet", name)["spec"]["template"]["spec"]["containers"]
    [password] = [variable for variable in redis["env"] if variable["name"] == "REDIS_PASSWORD"]
    assert options["redisPassword"] == {"valueFrom": password["valueFrom"]}


def test_the_service_knows_its_settings() -> None:
    from pixellm.platform.settings import load_settings

    given = yaml.safe_load(_one("gpu", "RayService")["spec"]["serveConfigV2"])
    assert load_settings(None, given["applications"][0]["args"]["overrides"]).serve.replica_gpus == 1


@pytest.mark.parametrize("job", _jobs(), ids=lambda job: job["metadata"]["generateName"])
def test_a_jobs_command_is_one_of_ours(job: Object, repository: Path) -> None:
    from command_check import problem_with

    place, _, command = job["spec"]["entrypoint"].partition(" && exec ")
    assert place == "cd /shared"
    words = shlex.split(command)
    assert words[:4] == ["python3", "-P", "-m", "pixellm.job"]
    assert problem_with(["pixellm", *words[4:]]) is None
    assert set(yaml.safe_load(job["spec"]["runtimeEnvYAML"])) == {"env_vars"}
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == _one("gpu", "RayCluster")["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_ray_cluster_asks_for_a_token(overlay: str, pins: dict[str, str]) -> None:
    for spec in (_one(overlay, "RayCluster")["spec"], _one(overlay, "RayService")["spec"]["rayClusterConfig"]):
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["rayVersion"] == pins["ray"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_in_a_file_and_each_that_is_named_is_documented(overlay: str, repository: Path) -> None:
    text = (repository / "docs" / "cluster.md").read_text(encoding="utf-8")
    named: set[str] = set()

    def look(node: Any) -> None:
        if isinstance(node, dict):
            for key in ("secretKeyRef", "secretRef"):
                if key in node:
                    named.add(node[key]["name"])
            for value in node.values():
                look(value)
        elif isinstance(node, list):
            for value in node:
                look(value)

    look(_built(overlay))
    assert not [o for o in _built(overlay) if o["kind"] == "Secret"]
    assert named == SECRETS
    assert all(name in text for name in SECRETS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_between_objects_hold(overlay: str) -> None:
    objects = _built(overlay)
    maps = {o["metadata"]["name"]: set(o["data"]) for o in objects if o["kind"] == "ConfigMap"}
    claims = {o["metadata"]["name"] for o in objects if o["kind"] == "PersistentVolumeClaim"}
    for template in _pod_templates(objects):
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        for container in template["spec"]["containers"]:
            for source in container.get("envFrom", []):
                assert "configMapRef" not in source or source["configMapRef"]["name"] in maps
            for mount in container.get("volumeMounts", []):
                volume = volumes.get(mount["name"], {})
                if "subPath" in mount and "configMap" in volume:
                    assert mount["subPath"] in maps[volume["configMap"]["name"]]
    labels = [
        o["spec"]["template"]["metadata"]["labels"] for o in objects if o["kind"] in ("Deployment", "StatefulSet")
    ]
    for service in (o for o in objects if o["kind"] == "Service"):
        assert any(service["spec"]["selector"].items() <= label.items() for label in labels), service["metadata"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_containers_run_as_nobody_in_particular_with_pinned_images(overlay: str) -> None:
    templates = _pod_templates(_built(overlay))
    assert len(templates) >= 9
    for template in templates:
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            tag = container["image"].rpartition(":")[2]
            assert ":" in container["image"]
            assert any(character.isdigit() for character in tag), container["image"]
            assert "memory" in container["resources"]["limits"]


RAY = {"ray.io/is-ray-node": "yes"}


@pytest.mark.parametrize(
    ("source", "target", "port", "may"),
    [
        (RAY, RAY, 6379, True),
        (RAY, {"app": "mlflow"}, 5000, True),
        ({"app": "mlflow"}, {"app": "postgres"}, 5432, True),
        ({"app": "mlflow"}, {"app": "minio"}, 9000, True),
        ({"app": "prometheus"}, RAY, 8080, True),
        ({"app": "grafana"}, {"app": "prometheus"}, 9090, True),
        (RAY, {"app": "redis"}, 6379, True),
        ({"app": "mlflow"}, {"app": "redis"}, 6379, False),
        (RAY, {"app": "postgres"}, 5432, False),
        ({"app": "grafana"}, RAY, 8265, False),
        ({"app": "prometheus"}, RAY, 8265, False),
        ({"app": "grafana"}, {"app": "minio"}, 9000, False),
        ({"app": "stranger"}, RAY, 8265, False),
        ({"app": "stranger"}, {"app": "mlflow"}, 5000, False),
    ],
)
def test_pods_reach_whom_they_need_and_nobody_else(source: Object, target: Object, port: int, may: bool) -> None:
    policies = [o["spec"] for o in _built("local") if o["kind"] == "NetworkPolicy"]
    assert any(policy["podSelector"] == {} for policy in policies), "without it, a pod that no policy names is open"
    assert _is_let_in(policies, source, target, port) is may


def _is_let_in(policies: list[Object], source: Object, target: Object, port: int) -> bool:
    for policy in policies:
        if not _selects(policy["podSelector"], target):
            continue
        for rule in policy.get("ingress", []):
            is_source = any(
                "namespaceSelector" not in who and _selects(who["podSelector"], source) for who in rule["from"]
            )
            if is_source and port in [p["port"] for p in rule.get("ports", [{"port": port}])]:
                return True
    return False


def _selects(selector: Object, labels: Object) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(labels.get(term["key"]) in term["values"] for term in selector.get("matchExpressions", []))


def test_mlflow_understands_its_options() -> None:
    from mlflow.cli import server

    [container] = _one("local", "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["mlflow", "server"]
    given = server.make_context("server", list(container["args"])).params
    assert given["serve_artifacts"] is True
    assert given["artifacts_destination"] == "s3://mlflow"


def test_alerts_ask_for_metrics_that_exist(repository: Path) -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    from pixellm.serve.metrics import ServiceMetrics

    exported = {
        name
        for family in ServiceMetrics().registry.collect()
        for name in (family.name, *(f"{family.name}{end}" for end in ("_total", "_bucket", "_sum", "_count")))
    } | {f"ray_{name}" for name in METRICS_GAUGES}
    rules = yaml.safe_load((repository / "deploy" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
    described = (repository / "docs" / "operations.md").read_text(encoding="utf-8")
    for rule in rules["groups"][0]["rules"]:
        asked = set(re.findall(r"\b(?:pixellm|ray)_[a-z_]+", rule["expr"]))
        assert asked, rule["alert"]
        assert asked <= exported, asked - exported
        assert rule["alert"] in described
