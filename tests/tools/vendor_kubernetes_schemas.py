"""Make tests/data/kubernetes/schemas.json of KubeRay's definitions and of Kubernetes' Python client.

python tests/tools/vendor_kubernetes_schemas.py CHECKOUT_OF_KUBERAY   (needs `pip install kubernetes pyyaml`)

The pod specification is the one within RayCluster's, which is Kubernetes' own. Texts, defaults and what
deploy/kubernetes has no use for are left out; unknown fields are errors, as for `kubectl --validate=strict`.
"""

import json
import re
import sys
from pathlib import Path

import yaml
from kubernetes import client

OUT = Path(__file__).parent.parent / "data/kubernetes/schemas.json"
DROPPED = {"description", "default", "title"}
POD = {"ephemeralContainers", "affinity", "dnsConfig", "topologySpreadConstraints", "resourceClaims"}
VOLUMES = {"name", "emptyDir", "hostPath", "configMap", "secret", "persistentVolumeClaim"}
CONTAINER = {"lifecycle", "restartPolicyRules"}
CLUSTER = {
    "gcsFaultToleranceOptions",
    "autoscalerOptions",
    "historyServerOptions",
    "networkPolicy",
    "tlsOptions",
}
APPS, CORE, RAY = "apps/v1", "v1", "ray.io/v1"
MODELS = {"Deployment": APPS, "DaemonSet": APPS, "Service": CORE, "PersistentVolumeClaim": CORE}
KINDS = {**MODELS, "RayCluster": RAY, "RayJob": RAY}
SCALARS = {"str": "string", "int": "integer", "bool": "boolean", "float": "number", "datetime": "string"}


def pruned(schema):
    """Without texts, and without room for unknown fields."""
    if isinstance(schema, list):
        return [pruned(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {k: v for k, v in schema.items() if k not in DROPPED and not k.startswith("x-kubernetes-")}
    found = {k: pruned(v) for k, v in kept.items() if k != "properties"}
    if properties := schema.get("properties"):
        found["properties"] = {name: pruned(value) for name, value in properties.items()}
        found.setdefault("additionalProperties", False)
    return found


def specification(kuberay, kind):
    """Of a KubeRay kind, by its definition."""
    text = (kuberay / f"ray-operator/config/crd/bases/ray.io_{kind}.yaml").read_text()
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    found = next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    return found["properties"]["spec"]


def without(schema, names):
    for name in names:
        del schema["properties"][name]


def kuberays(kuberay):
    """Schemas of the pod, RayCluster and RayJob."""
    cluster, job = (pruned(specification(kuberay, kind)) for kind in ("rayclusters", "rayjobs"))
    head, worker = (cluster["properties"][name] for name in ("headGroupSpec", "workerGroupSpecs"))
    pod = head["properties"]["template"]["properties"]["spec"]
    without(pod, POD)
    volume = pod["properties"]["volumes"]["items"]["properties"]
    without(pod["properties"]["volumes"]["items"], set(volume) - VOLUMES)
    container = pod["properties"]["containers"]["items"]
    without(container, CONTAINER)
    for name in ("containers", "initContainers"):
        pod["properties"][name]["items"] = {"$ref": "#/$defs/Container"}
    template = head["properties"]["template"] = {"$ref": "#/$defs/PodTemplate"}
    without(head, {"headService", "ingressOptions"})
    worker["items"]["properties"]["template"] = job["properties"]["submitterPodTemplate"] = template
    without(cluster, CLUSTER)
    job["properties"]["rayClusterSpec"] = {"$ref": "#/$defs/RayClusterSpec"}
    without(job, {"deletionStrategy"})
    return {"PodSpec": pod, "Container": container, "RayClusterSpec": cluster, "RayJobSpec": job}


def of_model(kind, defs):
    """The schema of a type of Kubernetes' client, and in ``defs`` those that it refers to."""
    if kind in SCALARS:
        return {"type": SCALARS[kind]}
    if found := re.fullmatch(r"[Ll]ist\[(.*)\]", kind):
        return {"type": "array", "items": of_model(found[1], defs)}
    if found := re.fullmatch(r"[Dd]ict\[str, (.*)\]", kind):
        return {"type": "object", "additionalProperties": of_model(found[1], defs)}
    if kind in ("object", "IntOrString"):
        return {"type": ["integer", "string"]}
    name = {"V1PodTemplateSpec": "PodTemplate"}.get(kind, kind.removeprefix("V1"))
    if name not in defs and name != "PodTemplate":
        model = defs[name] = {"type": "object", "additionalProperties": False, "properties": {}}
        of = getattr(client, kind)
        for field, type_ in of.openapi_types.items():
            if type_ != "V1ObjectMeta" and "ManagedFields" not in type_:
                model["properties"][of.attribute_map[field]] = of_model(type_, defs)
            if of.model_fields[field].is_required():
                model.setdefault("required", []).append(of.attribute_map[field])
    return {"$ref": f"#/$defs/{name}"}


def main():
    defs = kuberays(Path(sys.argv[1]))
    metadata = of_model("V1ObjectMeta", defs)
    for name, spec in (
        ("PodTemplate", "PodSpec"),
        ("RayCluster", "RayClusterSpec"),
        ("RayJob", "RayJobSpec"),
    ):
        properties = {"metadata": metadata, "spec": {"$ref": f"#/$defs/{spec}"}}
        defs[name] = {"type": "object", "additionalProperties": False, "properties": properties}
    for kind in MODELS:
        of_model(f"V1{kind}", defs)
        without(defs[kind], {"status"})
        defs[kind]["properties"]["metadata"] = metadata
    for name, version in KINDS.items():
        defs[name]["properties"] |= {"apiVersion": {"const": version}, "kind": {"const": name}}
        defs[name]["required"] = ["apiVersion", "kind", "metadata", "spec"]
    while unused := set(defs) - {*KINDS, *re.findall(r"#/\$defs/(\w+)", json.dumps(defs))}:
        for name in unused:
            del defs[name]
    OUT.write_text(json.dumps({"$defs": defs}, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
