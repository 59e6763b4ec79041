"""`ray up`, `exec`, `submit` and `down` for real, on three throw-away hosts of this machine."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.netns_hosts import NetnsHosts, missing

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parent.parent


def edited(hosts):
    """The shipped cluster.yaml with what a user edits; the hosts have this Python already."""
    settings = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    settings["cluster_name"] = "fuel_ray_test"
    settings["provider"] |= {"head_ip": hosts.ips[0], "worker_ips": hosts.ips[1:]}
    settings["auth"]["ssh_private_key"] = str(hosts.key)
    settings["setup_commands"] = [c for c in settings["setup_commands"] if ".bashrc" in c]
    settings["worker_setup_commands"] = []
    path = hosts.folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if missing():
        pytest.skip(f"no {', '.join(missing())}")
    with NetnsHosts(tmp_path_factory.mktemp("hosts"), 3) as made:

        def ray(*command, timeout_s=300, ok=True):
            variables = {"PATH": f"{made.folder}/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
            began_s = time.monotonic()
            done = made.operate("ray", *command, timeout_s=timeout_s, env=variables)
            print(f"ray {command[0]}: {time.monotonic() - began_s:.0f} s, status {done.returncode}")
            assert not ok or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            return done.stdout + done.stderr

        made.ray = ray
        made.path = str(edited(made))
        ray("get-auth-token", "--generate")
        yield made


@pytest.fixture(scope="module")
def cluster(hosts):
    """Up while the tests of this module run, then down."""
    hosts.ray("up", "-y", "--no-config-cache", hosts.path)
    yield hosts
    hosts.ray("down", "-y", hosts.path)
    assert "fuel_node" not in hosts.ray("exec", hosts.path, "ray status", ok=False)


SCRIPT = str(ROOT / "experiments/sweep_block_size.py")
SWEEP = ["--node", "ray", "--backend", "sim", "--control-workload", "None", "--seeds", "1"]


def submit(cluster, *flags):
    return cluster.ray("submit", cluster.path, SCRIPT, *SWEEP, *flags, timeout_s=600)


def test_a_sweep_of_four_block_sizes_on_two_nodes(cluster):
    said = submit(cluster, "--steps", "1024", "--train.iterations", "2")
    (run_dir,) = cluster.home("fuelt1").glob("results/sweep-*")
    assert {"report.html", "summary.csv"} <= {path.name for path in run_dir.iterdir()}, said
    for size in (8, 16, 32, 64):
        assert (run_dir / f"policies/block_{size}/weights.safetensors").is_file()
    assert json.loads((run_dir / "run.json").read_text())["config"]["node"] == "ray"
    table = [line for line in said.splitlines() if "J/request" in line and "|" in line]
    assert all(name in table[-1] for name in ("block size", "steps", "SLO attainment", "reward"))
    assert "2.0 fuel_node" in cluster.ray("exec", cluster.path, "ray status")
    assert cluster.ray("exec", cluster.path, "fuel-ray doctor --cluster --backend sim").count(" clock ") == 3
    page = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8265').read()[:4000])"
    assert "Ray Dashboard" in cluster.ray("exec", cluster.path, f'python -c "{page}"')


def test_a_sweep_goes_on_after_its_driver_was_killed_and_its_head_restarted(cluster):
    flags = ["--steps", "4096", "--train.iterations", "8", "--block-sizes", "16", "--out", "interrupted"]
    with ThreadPoolExecutor(1) as threads:
        killed = threads.submit(cluster.ray, "submit", cluster.path, SCRIPT, *SWEEP, *flags, ok=False)
        wait_for_results(cluster, 3)
        cluster.ray("exec", cluster.path, "pkill -9 -f [s]weep_block_size.py", ok=False)
        killed.result(60)
    before = results(cluster)
    cluster.ray("up", "-y", "--no-config-cache", cluster.path)  # restarts Ray on every host
    (run_dir,) = cluster.home("fuelt1").glob("interrupted/sweep-*")
    cluster.ray("submit", cluster.path, SCRIPT, "--resume", f"interrupted/{run_dir.name}", timeout_s=600)
    assert (run_dir / "report.html").is_file()
    steps = results(cluster)
    assert sorted(set(steps)) == [512 * (i + 1) for i in range(8)]
    assert len(before) >= 3 and len(steps) - len(set(steps)) <= 2  # of a result each


def results(cluster):
    """Env steps of each training result."""
    paths = list(cluster.home("fuelt1").glob("interrupted/*/tune/*/result.json"))
    return [
        json.loads(line)["num_env_steps_sampled_lifetime"]
        for p in paths
        for line in p.read_text().splitlines()
    ]


def wait_for_results(cluster, count):
    deadline_s = time.monotonic() + 240
    while len(results(cluster)) < count:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_a_cluster_file_with_hosts_that_do_not_answer_is_said_in_seconds(cluster, tmp_path):
    settings = yaml.safe_load(Path(cluster.path).read_text())
    settings["provider"]["worker_ips"] = [cluster.ips[1], "10.77.31.77"]
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(settings))
    began_s = time.monotonic()
    done = cluster.operate(
        *(sys.executable, "-m", "fuel_ray", "doctor", "--cluster-file", str(path)), timeout_s=60, env={}
    )
    assert done.returncode == 1 and time.monotonic() - began_s < 30
    marks = [line[:4].strip() for line in done.stdout.splitlines()]
    assert marks == ["ok", "ok", "FAIL"]
    assert "10.77.31.77" in done.stdout.splitlines()[-1] and "worker_ips" in done.stdout.splitlines()[-1]
