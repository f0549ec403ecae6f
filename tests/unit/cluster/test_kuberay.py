"""kuberay/: its fields, its versions, and what no schema looks at.

`KUBERAY_CRDS=DIR python -m pytest tests/unit/cluster/test_kuberay.py` also takes the definitions of a KubeRay release:
DIR is crds/ of its Helm chart.
"""

import copy
import os
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.helpers.commands import Command, parse
from tests.unit.cluster.test_cluster_yaml import CLUSTER, PROJECT, RAY_VERSION, ROOT

pytestmark = pytest.mark.unit

PYTHON = re.match(r">=3\.(\d+)", PROJECT["requires-python"])[1]
FIELDS = yaml.safe_load(Path(__file__).with_name("kuberay_fields.yaml").read_text())
DOCUMENTS = {
    f"{path.stem} {document['kind']}": document
    for path in sorted((ROOT / "kuberay").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
}
JOBS = {name: document for name, document in DOCUMENTS.items() if document["kind"] == "RayJob"}
RAY_CLUSTER = DOCUMENTS["raycluster RayCluster"]
GROUPS = {group["groupName"]: group for group in RAY_CLUSTER["spec"]["workerGroupSpecs"]}


def pods():
    return [RAY_CLUSTER["spec"]["headGroupSpec"], *GROUPS.values()]


def containers():
    return [container for group in pods() for container in group["template"]["spec"]["containers"]]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_field_is_known(name):
    document = DOCUMENTS[name]
    schema = FIELDS[document["kind"]]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    wrong = copy.deepcopy(document)
    wrong.setdefault("spec", {})["entrypont"] = "python"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def strict(schema):
    """A definition of Kubernetes' own kind as JSON schema, in which a field that is not defined is an error."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items() if key in ("items", "additionalProperties", "not")}
    made |= {key: schema[key] for key in ("type", "enum", "required", "pattern", "minimum", "maximum") if key in schema}
    made |= {key: [strict(each) for each in schema[key]] for key in ("allOf", "anyOf", "oneOf") if key in schema}
    if "properties" in schema:
        made["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    return made


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no definitions of KubeRay")
@pytest.mark.parametrize("name", [name for name, document in DOCUMENTS.items() if document["kind"] != "ServiceAccount"])
def test_kuberays_own_definitions_take_it(name):
    document = DOCUMENTS[name]
    file = Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{document['kind'].lower()}s.yaml"
    versions = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    (schema,) = (each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    validator = jsonschema.Draft202012Validator(strict(schema))
    assert not list(validator.iter_errors(document))
    wrong = copy.deepcopy(document)
    wrong["spec"]["entrypont"] = "python"
    assert list(validator.iter_errors(wrong))


def test_all_have_our_ray_and_python():
    """A wrong version on some node would be found out only when a job runs there."""
    dockerfile = (ROOT / "kuberay" / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)$", dockerfile, re.M) == [f"rayproject/ray:{RAY_VERSION}-py3{PYTHON}"]
    assert re.findall(r"ray\.__version__ == '([^']+)'", dockerfile) == [RAY_VERSION]
    assert RAY_CLUSTER["spec"]["rayVersion"] == RAY_VERSION
    assert CLUSTER["docker"]["image"] == f"rayproject/ray:{RAY_VERSION}-py3{PYTHON}"


def test_the_image_is_of_exactly_our_pins_and_has_all_that_jobs_need():
    """pip takes the versions from pyproject.toml, which the image gets before."""
    dockerfile = (ROOT / "kuberay" / "Dockerfile").read_text()
    (extras,) = re.findall(r'pip install --no-cache-dir "\.\[([\w,]+)\]"', dockerfile)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert dockerfile.count("pip install") == 1
    copied = [words for line in re.findall(r"^COPY --chown=\S+ (.*)$", dockerfile, re.M) for words in line.split()[:-1]]
    assert {"pyproject.toml", "README.md", "LICENSE", "bert4rec", "jobs", "configs"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)


def test_there_is_one_image_of_this_version():
    assert {container["image"] for container in containers()} == {f"REGISTRY/bert4rec:{PROJECT['version']}"}
    assert f"-t REGISTRY/bert4rec:{PROJECT['version']} " in (ROOT / "kuberay" / "Dockerfile").read_text()


def test_the_head_does_no_work_and_groups_grow_from_nothing():
    assert RAY_CLUSTER["spec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert RAY_CLUSTER["spec"]["enableInTreeAutoscaling"] is True
    assert RAY_CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    for group in GROUPS.values():
        assert 0 == group["minReplicas"] == group["replicas"] < group["maxReplicas"]
    sizes = {name: group["template"]["spec"]["containers"][0]["resources"]["limits"] for name, group in GROUPS.items()}
    assert {name: size.get("nvidia.com/gpu") for name, size in sizes.items()} == {"cpu": None, "gpu": "1"}
    for container in containers():  # Ray counts the limits; more than was requested would not be there
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_pods_use_the_service_account_that_is_there():
    account = DOCUMENTS["raycluster ServiceAccount"]["metadata"]["name"]
    assert {group["template"]["spec"]["serviceAccountName"] for group in pods()} == {account}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_on_the_cluster_with_keys_that_exist(name):
    spec = JOBS[name]["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": RAY_CLUSTER["metadata"]["name"]}
    assert not re.search(r"[&|;<>$`'\"]", spec["entrypoint"])  # KubeRay gives it to a shell, before Ray does
    python, m, module, *arguments = shlex.split(spec["entrypoint"])
    assert (python, m) == ("python", "-m")
    config = parse(Command(name, module.removeprefix("jobs."), tuple(arguments), False))
    assert config.run.storage_path == "s3://BUCKET/runs"
    if module != "jobs.prepare":  # a job cannot count nodes that have not started
        assert config.training.accelerator == "gpu"
        assert {"jobs.train": config.training, "jobs.recommend": config.inference}.get(
            module, config.tune
        ).model_dump().items() & {("num_workers", 2), ("max_concurrent_trials", 4)}
    most = GROUPS["gpu"]["maxReplicas"]
    assert max(config.training.num_workers or 1, config.inference.num_workers or 1) <= most
    assert (config.tune.max_concurrent_trials or 1) <= most
