"""Properties of compose/ that can be checked without a Docker engine."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraserve.config import engine_names, load_config

ROOT = Path(__file__).resolve().parents[3]
COMPOSE = ROOT / "compose"
SINGLE = {"store", "planner", "monitor", "router", "gateway-0"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return content


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


def test_services_are_the_processes_of_the_configuration(services: dict[str, dict[str, Any]]) -> None:
    config = load_config(COMPOSE / "loraserve.toml", environ={})
    assert services.keys() == SINGLE | set(engine_names(config))
    assert len(services) == 7
    assert all(name == service["command"][-1] for name, service in services.items()), "peers are found by service name"


def test_each_service_is_checked_for_its_own_health(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        test = service["healthcheck"]["test"]
        assert test[0] == "CMD"
        assert name in test or (name == "gateway-0" and "/health" in test[-1]), name


def test_only_the_gateway_is_published_and_only_on_this_machine(services: dict[str, dict[str, Any]]) -> None:
    config = load_config(COMPOSE / "loraserve.toml", environ={})
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"gateway-0": [f"127.0.0.1:${{LORASERVE_PORT:-8000}}:{config.gateway.port}"]}
    assert not any("network_mode" in service or service.get("privileged") for service in services.values())


def test_all_but_the_gateway_are_on_the_private_network_alone(
    compose: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    assert compose["networks"]["cluster"] == {"internal": True}
    assert {name for name, service in services.items() if service["networks"] != ["cluster"]} == {"gateway-0"}
    config = load_config(COMPOSE / "loraserve.toml", environ={})
    assert {config.bus.connect, config.bus.connect_pub} == {"tcp://{name}:5570", "tcp://{name}:5571"}


def test_every_mounted_volume_has_a_folder_that_the_user_of_the_image_owns(
    compose: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    mounts = [mount.split(":")[:2] for service in services.values() for mount in service.get("volumes", ())]
    assert {volume for volume, _ in mounts} == set(compose["volumes"])
    (owned,) = re.findall(r"install -d -o loraserve -g loraserve (.+)$", final_stage(), re.MULTILINE)
    assert {path for _, path in mounts} <= set(owned.split())


def test_the_image_runs_as_a_user_and_keeps_no_setting_of_the_build() -> None:
    assert re.findall(r"^USER (.+)$", final_stage(), re.MULTILINE) == ["loraserve"]
    assert "PIP_" not in final_stage()


def test_plain_docker_compose_finds_the_file_from_the_root() -> None:
    settings = dict(line.split("=", 1) for line in (ROOT / ".env").read_text().splitlines() if "=" in line)
    assert settings == {"COMPOSE_FILE": "compose/compose.yaml"}


def final_stage() -> str:
    return "FROM " + (COMPOSE / "Dockerfile").read_text().rpartition("\nFROM ")[2]
