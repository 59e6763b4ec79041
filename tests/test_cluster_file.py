"""The shipped cluster.yaml is what `ray up` takes, with three places to edit."""

from pathlib import Path

import pytest
import yaml

PATH = Path(__file__).parent.parent / "cluster.yaml"


@pytest.mark.ray
def test_ray_takes_it_and_starts_a_node_per_worker():
    from ray.autoscaler._private.util import prepare_config, validate_config

    from fuel_ray.cluster.hosts import NODE_RESOURCE

    settings = yaml.safe_load(PATH.read_text())
    prepared = prepare_config(settings)
    validate_config({**prepared, "cluster_synced_files": []})
    (kind,) = prepared["available_node_types"].values()
    assert kind["min_workers"] == len(settings["provider"]["worker_ips"])
    head, worker = settings["head_start_ray_commands"][-1], settings["worker_start_ray_commands"][-1]
    assert "RAY_enable_autoscaler_v2=0" in head and f'{{"{NODE_RESOURCE}": 1}}' in worker
    assert "RAY_AUTH_MODE=token" in head and "RAY_AUTH_MODE=token" in worker


def test_a_user_edits_three_places():
    marks = [line.split("EDIT")[1][:2].strip() for line in PATH.read_text().splitlines() if "# EDIT" in line]
    assert marks == ["1", "2", "3"]


def test_the_aws_part_is_yaml_too():
    _, _, part = PATH.read_text().partition("# provider: {type: aws")
    lines = ("# provider: {type: aws" + part).splitlines()
    settings = yaml.safe_load("\n".join(line[2:] for line in lines))
    assert settings["available_node_types"]["gpu"]["resources"]["fuel_node"] == 1
    assert settings["head_node_type"] in settings["available_node_types"]


def test_no_mounted_folder_hides_the_package():
    """`ray submit` runs scripts in the home folder, where Python would import a checkout named fuel_ray."""
    settings = yaml.safe_load(PATH.read_text())
    assert "fuel_ray" not in {Path(target).name for target in settings["file_mounts"]}
