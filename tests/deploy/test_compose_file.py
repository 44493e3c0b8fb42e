"""`deploy/compose.yaml` is valid by the Compose specification, and holds together."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def published_schema() -> Any:
    """The Compose specification's, as the package check-jsonschema carries it."""
    text = files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    return jsonschema.validators.validator_for(schema)(schema)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_it_is_valid_by_the_published_schema(name: str, published_schema: Any) -> None:
    published_schema.validate(yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8")))


def test_the_schema_would_catch_a_misspelt_key(compose: dict[str, Any], published_schema: Any) -> None:
    wrong = compose | {"services": {"ray": {"image": "pixellm", "comand": ["ray"]}}}
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        published_schema.validate(wrong)


def test_every_variable_is_explained_and_no_secret_has_a_default(compose: dict[str, Any]) -> None:
    example = (DEPLOY / "compose.env.example").read_text(encoding="utf-8")
    explained = dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE))
    used = re.findall(r"\$\{([A-Z_]+)(:[-?])?", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert {name for name, _ in used} == set(explained)
    secrets = {name for name in explained if re.search("PASSWORD|TOKEN", name)}
    assert len(secrets) == 4
    for name, operator in used:
        if name in secrets:
            assert (operator, explained[name]) == (":?", "")


def test_what_is_mounted_and_waited_for_exists(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), (name, source)
            elif not source.startswith("$"):
                assert source in compose["volumes"]
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in compose["services"][other]


def test_nothing_listens_beyond_the_machine_and_every_image_is_pinned(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert re.search(r":\S*\d", service["image"])
        assert "no-new-privileges:true" in service["security_opt"]


def test_the_service_is_the_one_of_serve_config(compose: dict[str, Any], repository: Path) -> None:
    given = yaml.safe_load(compose["configs"]["serve"]["content"])
    plain = yaml.safe_load((repository / "serve" / "config.yaml").read_text(encoding="utf-8"))
    plain["applications"][0]["args"]["overrides"].append("serve.api_keys_file=/run/pixellm/keys.txt")
    assert given == plain


def test_ray_and_mlflow_understand_their_options(compose: dict[str, Any]) -> None:
    from mlflow.cli import server
    from ray.scripts.scripts import start
    from ray.serve.scripts import deploy

    for command, words in (
        (start, compose["services"]["ray"]["command"]),
        (server, compose["services"]["mlflow"]["command"]),
        (deploy, [word.replace("/etc/pixellm", str(DEPLOY.parent / "serve")) for word in _serve_words(compose)]),
    ):
        command.make_context(words[1], list(words[2:]))


def _serve_words(compose: dict[str, Any]) -> list[str]:
    return [word.replace("serve.yaml", "config.yaml") for word in compose["services"]["serve"]["command"]]


def test_prometheus_scrapes_ports_that_are_listened_on(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "one-machine.yml").read_text(encoding="utf-8"))
    targets = {job["job_name"]: job["static_configs"][0]["targets"][0] for job in config["scrape_configs"]}
    assert "--metrics-export-port=" + targets["ray"].split(":")[1] in compose["services"]["ray"]["command"]
    served = yaml.safe_load(compose["configs"]["serve"]["content"])["http_options"]["port"]
    assert targets["pixellm"] == f"ray:{served}"
