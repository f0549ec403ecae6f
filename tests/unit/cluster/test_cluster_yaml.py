"""cluster.yaml and cluster-gcp.yaml against Ray's own schema, and what the schema does not look at."""

import copy
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
CLUSTER, GCP = (yaml.safe_load((ROOT / name).read_text()) for name in ("cluster.yaml", "cluster-gcp.yaml"))
both = pytest.mark.parametrize("cluster", [CLUSTER, GCP], ids=["aws", "gcp"])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY_VERSION = next(re.search(r"==(.+)", line)[1] for line in PROJECT["dependencies"] if line.startswith("ray["))


@both
def test_it_is_valid_for_ray(cluster):
    validate_config(prepare_config(copy.deepcopy(cluster)))
    with pytest.raises(Exception, match="Failed validating"):
        validate_config(prepare_config(copy.deepcopy(cluster) | {"max_workers": "many"}))


def test_region_counts_and_resources_fit_together():
    """What Ray's schema takes whatever it is."""
    region = CLUSTER["provider"]["region"]
    assert re.fullmatch(r"[a-z]{2}(-gov)?-[a-z]+-\d", region)
    for zone in filter(None, CLUSTER["provider"].get("availability_zone", "").split(",")):
        assert re.fullmatch(region + "[a-z]", zone)
    types = CLUSTER["available_node_types"]
    assert CLUSTER["head_node_type"] in types
    workers = {name: kind for name, kind in types.items() if name != CLUSTER["head_node_type"]}
    for kind in workers.values():
        assert 0 == kind["min_workers"] <= kind["max_workers"] <= CLUSTER["max_workers"]
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert {"GPU" in kind["resources"] for kind in workers.values()} == {True, False}
    assert 0 < CLUSTER["idle_timeout_minutes"] <= 15
    # vCPUs and GPUs of the instance types, https://aws.amazon.com/ec2/instance-types/
    sizes = {"m5.xlarge": (4, 0), "m5.2xlarge": (8, 0), "g5.xlarge": (4, 1)}
    for kind in workers.values():
        cpus, gpus = sizes[kind["node_config"]["InstanceType"]]
        assert kind["resources"] == {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def test_gcps_groups_are_those_of_aws():
    assert GCP["provider"]["availability_zone"].startswith(GCP["provider"]["region"] + "-")
    assert GCP["max_workers"] == CLUSTER["max_workers"]
    for name, kind in GCP["available_node_types"].items():
        of_aws = CLUSTER["available_node_types"][name]
        assert {key: value for key, value in kind.items() if key != "node_config"} == {
            key: value for key, value in of_aws.items() if key != "node_config"
        }
        scheduling = dict(pair for each in kind["node_config"].get("scheduling", []) for pair in each.items())
        assert scheduling.get("preemptible", False) == ("InstanceMarketOptions" in of_aws["node_config"])
        # Google moves machines without GPUs during maintenance, and must end those with one.
        assert ("guestAccelerators" in kind["node_config"]) == (scheduling.get("onHostMaintenance") == "TERMINATE")
        cores = int(kind["node_config"]["machineType"].rpartition("-")[2])  # as Google names them
        assert kind["resources"]["CPU"] in (0, cores)


@both
def test_the_head_does_no_work_and_shows_its_dashboard_to_nobody_else(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert not {"InstanceMarketOptions", "scheduling"} & set(head["node_config"])
    start = cluster["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


@both
def test_nodes_have_our_pins_and_images_of_our_ray_and_python(cluster):
    """A wrong version on some node would be found out only when a job runs there."""
    (install,) = cluster["setup_commands"]
    assert re.findall(r'"([^"]+)"', install) == PROJECT["dependencies"]
    python = re.match(r">=3\.(\d+)", PROJECT["requires-python"])[1]
    image = f"rayproject/ray:{RAY_VERSION}-py3{python}"
    gpu = cluster["available_node_types"]["gpu_worker"]
    assert (cluster["docker"]["image"], gpu["docker"]["worker_image"]) == (image, f"{image}-gpu")
