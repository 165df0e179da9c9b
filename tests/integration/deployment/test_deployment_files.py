"""The files that operators start from are what their own tools accept, and fit each other."""

import json
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import Settings
from tests.tools import run_tool

ROOT = Path(__file__).parents[3]
PROMETHEUS = ROOT / "docker" / "prometheus"
GRAFANA = ROOT / "docker" / "grafana"

SET_BY_THE_IMAGE = {"BRAINSTACKS_SERVER__HOST", "BRAINSTACKS_SERVER__PORT", "BRAINSTACKS_STORE__PATH"}


DEPLOYMENT_PAGE = (ROOT / "docs" / "deployment.md").read_text()
COMPOSE_TEST = (ROOT / "docker" / "compose_test.sh").read_text()
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def composed(*options: str, folder: Path = ROOT, **environ: str) -> dict[str, Any]:
    """The services that compose makes of the file in the folder, for one profile or with an override."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BRAINSTACKS_", "COMPOSE_"))}
    shown = run_tool("docker-compose", *options, "config", "--format", "json", cwd=folder, env={**kept, **environ})
    services: dict[str, Any] = json.loads(shown)["services"]
    return services


@pytest.mark.parametrize(("profile", "server"), [("cpu", "server"), ("gpu", "server-gpu")])
def test_each_profile_is_a_server_and_what_watches_it(profile: str, server: str) -> None:
    services = composed("--profile", profile)
    assert set(services) == {server, "prometheus", "grafana"}
    assert services[server]["read_only"] is True
    assert services[server]["build"]["args"]["TORCH_VARIANT"] == {"cpu": "cpu", "gpu": "cuda"}[profile]
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert all(port["host_ip"] == "127.0.0.1" for port in service["ports"])
    devices = services[server].get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert [device["capabilities"] for device in devices] == ([["gpu"]] if profile == "gpu" else [])
    assert services[server]["init"] is True


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_server_that_does_not_start_is_watched(profile: str) -> None:
    services = composed("--profile", profile)
    assert "depends_on" not in services["prometheus"]
    assert services["grafana"]["depends_on"].keys() == {"prometheus"}


def test_another_gpu_is_chosen_as_the_documentation_says(tmp_path: Path) -> None:
    (override,) = re.findall(r"^```yaml\n(.*?)^```", DEPLOYMENT_PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "override.yml").write_text(override)
    services = composed("--profile", "gpu", "-f", "docker-compose.yml", "-f", str(tmp_path / "override.yml"))
    (device,) = services["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["1"], "capabilities": ["gpu"]}


def test_the_documentation_tells_what_the_files_say() -> None:
    (extras,) = re.findall(r'^ARG EXTRAS="(.*)"$', DOCKERFILE, re.MULTILINE)
    assert f"(default: `{extras}`," in DEPLOYMENT_PAGE
    (minutes,) = re.findall(r"--start-period=(\d+)m ", DOCKERFILE)
    assert f"A container has {minutes} minutes to start" in DEPLOYMENT_PAGE
    (seconds,) = re.findall(r"compose waits (\d+) seconds", DEPLOYMENT_PAGE)
    for profile, server in (("cpu", "server"), ("gpu", "server-gpu")):
        grace = re.fullmatch(r"(\d+)m(\d+)s", composed("--profile", profile)[server]["stop_grace_period"])
        assert grace
        assert 60 * int(grace[1]) + int(grace[2]) == int(seconds)


def test_a_faulty_compose_file_is_told(tmp_path: Path) -> None:
    """So that the tests beside this one see what compose says."""
    (tmp_path / "docker-compose.yml").write_text("services: {server: {image: x, depends_on: [nobody]}}")
    with pytest.raises(AssertionError, match="nobody"):
        run_tool("docker-compose", "config", cwd=tmp_path)


def test_the_override_of_compose_test_fits_the_shipped_file() -> None:
    services = composed("--profile", "cpu", "-f", "docker-compose.yml", "-f", "docker/compose.test.yml")
    assert all("ports" not in service for service in services.values())


def test_settings_of_the_shell_reach_the_server_and_no_others() -> None:
    services = composed("--profile", "cpu", BRAINSTACKS_LOG__LEVEL="debug", BRAINSTACKS_LOG__OTHER="x")
    assert services["server"]["environment"] == {"BRAINSTACKS_LOG__LEVEL": "debug"}


def test_values_of_the_env_file_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    for file in ("docker-compose.yml", "docker/passed.env"):
        shutil.copy(ROOT / file, tmp_path / file)
    value = """a$b${HOME}'c' "d" #e"""
    (tmp_path / "brainstacks.env").write_text(f"# keys\nBRAINSTACKS_SERVER__ADMIN_KEY={value}\n")
    services = composed("--profile", "cpu", folder=tmp_path)
    assert services["server"]["environment"]["BRAINSTACKS_SERVER__ADMIN_KEY"].replace("$$", "$") == value


def test_compose_test_has_the_shipped_settings(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    for file in ("docker-compose.yml", "docker/passed.env", "docker/compose.test.yml"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "brainstacks.env").write_text("BRAINSTACKS_LOG__LEVEL=debug\n")
    (tmp_path / ".env").write_text("GRAFANA_PASSWORD=secret\nHF_TOKEN=secret\n")
    options = re.findall(r"--env-file \S+|--file docker\S+", COMPOSE_TEST)
    services = composed("--profile", "cpu", *" ".join(options).split(), folder=tmp_path)
    assert not services["server"].get("environment")
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "admin"
    read = set(re.findall(r"\$\{(\w+):-", (ROOT / "docker-compose.yml").read_text()))
    (unset,) = re.findall(r"^unset .*", COMPOSE_TEST, re.MULTILINE)
    assert read - set(unset.split()) == {"TORCH_INDEX_URL", "REVISION"}  # of the build


def test_index_of_the_first_build_holds_for_later_ones(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    for file in ("docker-compose.yml", "docker/passed.env"):
        shutil.copy(ROOT / file, tmp_path / file)
    (line,) = re.findall(r"^    echo '(.*)' >> \.env$", DEPLOYMENT_PAGE, re.MULTILINE)
    (tmp_path / ".env").write_text(line.replace("<index of CPU builds of torch>", "https://index") + "\n")
    services = composed("--profile", "cpu", folder=tmp_path)
    assert services["server"]["build"]["args"]["TORCH_INDEX_URL"] == "https://index"
    assert {"/.env", "/brainstacks.env"} <= set((ROOT / ".gitignore").read_text().splitlines())


def test_every_setting_can_be_passed_on() -> None:
    settings = {
        f"BRAINSTACKS_{section}__{key}".upper()
        for section, field in Settings.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    }
    lines = (ROOT / "docker" / "passed.env").read_text().splitlines()
    assert {line for line in lines if line.startswith("BRAINSTACKS_")} == settings - SET_BY_THE_IMAGE


def test_the_dockerfile_passes_hadolint() -> None:
    run_tool("hadolint", "docker/Dockerfile", cwd=ROOT)


def test_the_image_is_labelled_with_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG VERSION={version}\n" in DOCKERFILE


def test_prometheus_accepts_its_configuration_and_its_rules() -> None:
    run_tool("promtool", "check", "config", str(PROMETHEUS / "prometheus.yml"), cwd=ROOT)


def test_every_alert_fires_for_the_ill_server_and_none_for_the_well_one() -> None:
    told = yaml.safe_load(Path(__file__).with_name("alerts_test.yml").read_text())
    samples = told["tests"][0]["promql_expr_test"][0]["exp_samples"]
    tested = {re.findall(r'alertname="(\w+)"', sample["labels"])[0] for sample in samples}
    assert tested == {rule["alert"] for rule in alert_rules()}
    run_tool("promtool", "test", "rules", "alerts_test.yml", cwd=Path(__file__).parent)


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_alert_says_what_is_wrong_and_is_in_the_documentation() -> None:
    for rule in alert_rules():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]
        assert rule["annotations"]["description"], rule["alert"]
        assert f"`{rule['alert']}`" in DEPLOYMENT_PAGE


def test_the_dashboard_is_provisioned_with_its_data_source() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/brainstacks.yml").read_text())["providers"]
    mounts = {mount["target"]: mount["source"] for mount in composed("--profile", "cpu")["grafana"]["volumes"]}
    (file,) = Path(mounts[provider["options"]["path"]]).glob("*.json")
    variables = {variable["name"]: variable for variable in json.loads(file.read_text())["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
    assert mounts["/etc/grafana/provisioning"] == str(GRAFANA / "provisioning")


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    panels = json.loads((GRAFANA / "dashboards" / "brainstacks.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        rows, columns = range(place["y"], place["y"] + place["h"]), range(place["x"], place["x"] + place["w"])
        cells = {(row, column) for row in rows for column in columns}
        assert columns.stop <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or (panel["description"] and panel["fieldConfig"]["defaults"]["unit"])
