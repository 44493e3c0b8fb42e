"""Pure judgements: a stuck engine, a taken port, which model a name means, metrics."""

import os
import re
import socket
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from pixellm.errors import ConfigError, ModelLoadError, ServingError
from pixellm.platform.settings import TrackingSettings
from pixellm.serve.app import application
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.model_card import ModelCard, pin
from pixellm.serve.port_check import check_port_is_free
from pixellm.serve.protocol import Answer, EngineReport
from pixellm.serve.roster import Roster, Track, TrackState
from pixellm.serve.stall_watch import StallWatch


def test_an_engine_is_stuck_only_when_it_has_work_and_makes_no_step_for_longer_than_the_limit() -> None:
    watch = StallWatch(limit_s=10)
    assert watch.observe(1, is_busy=True, now_s=0) is None
    assert watch.observe(1, is_busy=True, now_s=9) is None
    assert watch.observe(2, is_busy=True, now_s=11) is None  # a step: the clock starts again
    assert watch.observe(2, is_busy=True, now_s=20) is None
    assert watch.observe(2, is_busy=False, now_s=100) is None  # nothing to do is not being stuck
    assert watch.observe(2, is_busy=True, now_s=105) is None
    assert watch.observe(2, is_busy=True, now_s=111) == 11


def test_a_taken_port_is_named_with_its_holder_and_the_option() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ServingError, match=rf"port {port} .* process {os.getpid()} .* --port"):
            check_port_is_free("127.0.0.1", port)
    check_port_is_free("127.0.0.1", port)


def test_an_address_of_another_machine_is_said_to_be_unusable() -> None:
    with pytest.raises(ServingError, match=r"192\.0\.2\.77:8000.*--host"):
        check_port_is_free("192.0.2.77", 8000)
    with pytest.raises(ConfigError, match="--port is 99999; wanted a port from 1 to 65535"):
        check_port_is_free("127.0.0.1", 99999)


def test_a_model_answers_to_its_name_its_version_and_the_reference_it_was_asked_by() -> None:
    card = ModelCard("pixellm", "3", "models:/pixellm/3", "models:/pixellm@champion", 0)
    names = (None, "pixellm", "pixellm/3", "models:/pixellm/3", "models:/pixellm@champion")
    assert all(card.answers_to(name) for name in names)
    assert not card.answers_to("pixellm/2")
    assert not card.answers_to("gpt-4o")


def test_pickled_weights_are_refused_before_anything_opens_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    trap = tmp_path / "opened"
    (tmp_path / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {trap}'\ntR.".encode())
    with pytest.raises(ModelLoadError, match=r"safetensors.*pytorch_model\.bin"):
        pin(tmp_path, TrackingSettings())
    assert not trap.exists()


def test_the_shipped_configuration_is_serves_own_and_builds_the_service() -> None:
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).parents[2] / "serve" / "config.yaml"
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (entry,) = config.applications
    module, _, builder = entry.import_path.partition(":")
    built = getattr(import_module(module), builder)(entry.args)
    assert type(built).__name__ == "Application"
    for wrong in ({}, {"models": []}, {"model": "models:/pixellm@champion"}):
        with pytest.raises(ConfigError, match="wanted models"):
            application(wrong)


def test_the_dashboard_asks_only_for_metrics_that_exist() -> None:
    board = Path(__file__).parents[2] / "deploy" / "grafana" / "pixellm-serving.json"
    asked = set(re.findall(r"pixellm_\w+", " ".join(re.findall(r'"expr": (".*")', board.read_text()))))
    known = {
        f"{family.name}{suffix}"
        for family in ServiceMetrics().registry.collect()
        for suffix in ("", "_total", "_bucket")
    }
    assert len(asked) > 15
    assert asked <= known


def test_metrics_are_prometheus_text() -> None:
    card = ModelCard("pixellm", "3", "models:/pixellm/3", "models:/pixellm@champion", 0)
    metrics = ServiceMetrics()
    state = TrackState(Track("models:/pixellm@champion"), card, "app", failed=(("4", "weights"),))
    metrics.show_roster(Roster(1, (state,)))
    usage = {"prompt_tokens": 100, "completion_tokens": 17}
    for hits, misses in ((0, 1), (1, 1)):
        report = EngineReport("replica", 3, 0, hits, misses, 500, 2.5)
        metrics.count_answer("pixellm", Answer("3", "a cat", (), usage, {"decode": 0.5}, engine=report))
    text = metrics.exposition().decode()
    assert 'pixellm_answers_total{model="pixellm",version="3"} 2.0' in text
    assert 'pixellm_tokens_total{kind="completion"} 34.0' in text
    assert 'pixellm_model_info{model="pixellm",share="1",version="3"} 1.0' in text
    assert 'pixellm_model_failed{track="models:/pixellm@champion",version="4"} 1.0' in text
    assert "pixellm_picture_cache_hits_total 1.0" in text
    assert "pixellm_picture_cache_misses_total 1.0" in text
    assert 'pixellm_cold_starts_total{version="3"} 1.0' in text
