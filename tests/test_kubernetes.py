"""deploy/kubernetes against the schemas of KubeRay and Kubernetes, and against the flags that it gives."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from fuel_ray.cluster.hosts import NODE_RESOURCE
from fuel_ray.commands import sweep
from fuel_ray.commands.clock_helper import ClockHelperConfig
from fuel_ray.commands.deploy import DeployConfig
from fuel_ray.flags import parse_flags
from fuel_ray.live.gpu.clock_client import SOCKET_VARIABLE
from fuel_ray.vllm_plugin import LIMIT_FILE_VARIABLE

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy/kubernetes"
SCHEMAS = json.loads((ROOT / "tests/data/kubernetes/schemas.json").read_text())
OBJECTS = {
    (path.name, found["kind"]): found
    for path in sorted(FOLDER.glob("*.yaml"))
    for found in yaml.safe_load_all(path.read_text())
}
HELPER, SERVING = OBJECTS["clock-helper.yaml", "DaemonSet"], OBJECTS["serving.yaml", "Deployment"]
CLUSTER, JOB = OBJECTS["raycluster.yaml", "RayCluster"], OBJECTS["rayjob.yaml", "RayJob"]


def check(found):
    jsonschema.validate(found, {**SCHEMAS, "$ref": f"#/$defs/{found['kind']}"})


def pods(found):
    """The pod specifications anywhere in an object."""
    if isinstance(found, dict):
        if "containers" in found:
            yield found
        else:
            yield from (pod for value in found.values() for pod in pods(value))
    if isinstance(found, list):
        yield from (pod for value in found for pod in pods(value))


PODS = [(name, pod) for name, found in OBJECTS.items() for pod in pods(found)]


def containers(pod):
    return {container["name"]: container for container in pod["containers"]}


def env(container):
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


def mounts(container):
    return {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}


def words(container, verb):
    """The flags that a container's script gives to a verb."""
    (script,) = container["args"]
    _, _, flags = script.replace("\\\n", " ").rpartition(f"fuel-ray {verb} ")
    return shlex.split(re.sub(r"\$\(.*?\)", "GPU-0", flags))


@pytest.mark.parametrize("found", OBJECTS.values(), ids=" ".join)
def test_an_object_is_what_its_schema_asks_for(found):
    check(found)


@pytest.mark.parametrize(
    ("found", "path", "value"),
    [
        (SERVING, ("spec", "template", "spec", "hostnetwork"), False),
        (SERVING, ("spec", "replicas"), "1"),
        (HELPER, ("spec", "selector"), None),
        (HELPER, ("apiVersion",), "v1"),
        (CLUSTER, ("spec", "workerGroupSpec"), []),
        (CLUSTER, ("spec", "authOptions", "mode"), "password"),
        (JOB, ("spec", "clusterSelector"), "fuel-ray"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_the_schemas_find_mistakes(found, path, value):
    wrong = json.loads(json.dumps(found))
    inner = wrong
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


@pytest.mark.parametrize(
    ("name", "pod"), PODS, ids=lambda value: value[0] if isinstance(value, tuple) else ""
)
def test_only_the_clock_helper_has_a_privilege(name, pod):
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    is_helper = name[0] == "clock-helper.yaml"
    for container in pod["containers"]:
        own = container["securityContext"]
        assert "privileged" not in own and own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]} | ({"add": ["SYS_ADMIN"]} if is_helper else {})
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert is_helper or (
        pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    )


@pytest.mark.parametrize("found", [HELPER, SERVING], ids=["helper", "serving"])
def test_what_is_selected_is_what_is_made(found):
    labels = found["spec"]["template"]["metadata"]["labels"]
    assert found["spec"]["selector"]["matchLabels"] == labels
    if found is SERVING:
        service = OBJECTS["serving.yaml", "Service"]["spec"]
        assert service["selector"] == labels
        ports = [p["name"] for c in found["spec"]["template"]["spec"]["containers"] for p in c["ports"]]
        assert {port["targetPort"] for port in service["ports"]} <= set(ports)


@pytest.mark.parametrize(
    ("name", "pod"), PODS, ids=lambda value: value[0] if isinstance(value, tuple) else ""
)
def test_volumes_that_are_mounted_are_there(name, pod):
    there = {volume["name"] for volume in pod.get("volumes", [])}
    assert {m for c in pod["containers"] if "volumeMounts" in c for m in mounts(c)} == there


def test_server_and_controller_share_the_limit_file():
    server, controller = containers(SERVING["spec"]["template"]["spec"]).values()
    config = parse_flags(DeployConfig, words(controller, "deploy"), prog="t")
    assert str(config.limit_file) == env(server)[LIMIT_FILE_VARIABLE]
    assert mounts(server)["limit"] == mounts(controller)["limit"] == str(config.limit_file.parent)
    assert config.policy == mounts(controller)["policy"]
    assert str(config.out) == mounts(controller)["out"]
    assert config.metrics_port in [port["containerPort"] for port in controller["ports"]]


def test_controllers_find_the_helpers_socket_and_may_open_it():
    (helper,) = HELPER["spec"]["template"]["spec"]["containers"]
    config = parse_flags(ClockHelperConfig, words(helper, "clock-helper"), prog="t")
    (worker,) = CLUSTER["spec"]["workerGroupSpecs"]
    for template in (SERVING["spec"]["template"], worker["template"]):
        pod = template["spec"]
        assert (str(pod["securityContext"]["runAsUser"]),) == config.users
        assert str(pod["securityContext"]["runAsGroup"]) == config.group
        (user,) = [c for c in pod["containers"] if "clocks" in mounts(c)]
        assert env(user)[SOCKET_VARIABLE] == str(config.socket)
        assert mounts(user)["clocks"] == mounts(helper)["clocks"] == str(config.socket.parent)
    assert helper["securityContext"]["runAsGroup"] == int(config.group)


def test_a_worker_is_a_node_and_the_job_is_the_sweep_on_the_cluster():
    (worker,) = CLUSTER["spec"]["workerGroupSpecs"]
    assert json.loads(json.loads(worker["rayStartParams"]["resources"])) == {NODE_RESOURCE: 1}
    assert JOB["spec"]["clusterSelector"] == {"ray.io/cluster": CLUSTER["metadata"]["name"]}
    program, verb, *flags = shlex.split(JOB["spec"]["entrypoint"])
    config = sweep.parse(flags, prog="t")
    assert (program, verb, config.node, config.backend) == ("fuel-ray", "sweep", "ray", "live")
    (head,) = CLUSTER["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert str(config.out) == mounts(head)["results"]
    assert worker["replicas"] == len(config.block_sizes)
    assert int(head["resources"]["limits"]["cpu"]) > len(config.block_sizes)


def test_the_images_have_the_version_of_ray_that_is_asked_for():
    image = (FOLDER / "Dockerfile").read_text().split("FROM rayproject/ray:")[1].split("-")[0]
    assert image == CLUSTER["spec"]["rayVersion"]
    assert f"ray[default]>={image.rpartition('.')[0]}" in (ROOT / "pyproject.toml").read_text()
