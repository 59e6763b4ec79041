"""A run that trains: its settings, its folder, its rounds of block sizes, and how it goes on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from fuel_ray.algorithms import branches
from fuel_ray.build.cluster import gpus_per_node
from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_node, build_spec, twin_of, twinned
from fuel_ray.build.resolve import Learning, Resolved, resolve
from fuel_ray.cluster.hosts import num_nodes
from fuel_ray.codec import Codec
from fuel_ray.config import LearnConfig, to_dict
from fuel_ray.disk import disk_faults
from fuel_ray.errors import ConfigError, DiskError, PolicyError, UnsupportedError
from fuel_ray.flags import parse_serving, resumed, value_of
from fuel_ray.policies.learned import read_policy
from fuel_ray.policies.packs import check_pack
from fuel_ray.progress import UNSEEN, Bar
from fuel_ray.record import fetch, new_folder, origin, publish, read_csv, read_json, stage, write_json
from fuel_ray.sim.pack import load_pack
from fuel_ray.training.trackers import check_trackers
from fuel_ray.training.trials import algorithm_of, start_ray
from fuel_ray.tuning.episodes import EPISODE_S, TUNING_SEEDS
from fuel_ray.tuning.tuned import read_baselines
from fuel_ray.workload.spec import parse_workload

_MAY_CHANGE = ("node_wait_s", "node_failures", "callbacks")  # when a run is resumed


def parse_run(config_class: type[Learning], argv: list[str], *, prog: str) -> Learning:
    """Settings of a run; with --resume, those that it began with, which flags may repeat but not change.

    Raises:
        ConfigError: a flag is wrong, or differs from the run that is to be resumed.
    """
    folder, storage = value_of(argv, "--resume"), value_of(argv, "--storage")
    if folder is None:
        return parse_serving(config_class, argv, prog=prog)
    if storage is not None and not Path(folder).exists():
        fetch(Path(folder), storage)
    return resumed(Path(folder), argv, prog=prog, base=config_class(), may_change=_MAY_CHANGE)


@contextmanager
def running(
    config: LearnConfig,
    verb: str,
    workloads: Sequence[str],
    *,
    held_out: Sequence[int],
    is_stage: bool = False,
) -> Iterator[Path]:
    """The folder of a run, new or resumed; one that is no stage of another run says how to continue it.

    What cannot be served is said before anything is written. Files are in --storage too in the end.

    Raises:
        ConfigError: a setting is wrong, or the calibration pack is not the one that the run began with.
        PolicyError: the policy to start from is none, or does not fit.
        NodeError: there is no such GPU.
    """
    _check(config, workloads)
    run_dir = config.resume or _new_run(config, verb, held_out)
    facts = read_json(run_dir / "run.json")
    if facts.get("pack", {}).get("sha256") != load_pack(config.pack).sha256:
        raise ConfigError(
            f"--resume {run_dir}: calibration pack {config.pack} has changed since that run began; start a "
            "new run"
        )
    with disk_faults() if is_stage else _alone(config, verb, run_dir):
        yield run_dir
        _publish(config, run_dir)


@contextmanager
def _alone(config: LearnConfig, verb: str, run_dir: Path) -> Iterator[None]:
    """Say where the run is and, if it is stopped, how to go on.

    Raises:
        DiskError: a file could not be written; the message says how to go on.
    """
    print(f"{verb}  {run_dir}: block sizes {', '.join(map(str, config.block_sizes))}, {config.workload}")
    try:
        with disk_faults():
            yield
    except (KeyboardInterrupt, SystemExit):
        print(f"\ninterrupted; to continue: fuel-ray {verb} --resume {run_dir}", flush=True)
        raise
    except DiskError as error:
        raise DiskError(f"{error}; then continue: fuel-ray {verb} --resume {run_dir}") from error


def in_rounds(
    config: Learning,
    run_dir: Path,
    work: Callable[[Resolved[Learning]], object],
    *,
    table: str,
    bar: Bar = UNSEEN,
) -> None:
    """Do the work of a run for as many block sizes at a time as have nodes, while their servers are kept.

    Block sizes with rows in the run's ``table`` are finished; a round that was begun is gone on with, since
    its trials are. Simulated nodes are all there at once, and are done again. What is found out goes to
    run.json.

    Raises:
        UnsupportedError: no block size can be served.
    """
    bar.stage("start")
    start_ray(config)
    while left := _left(config, run_dir / table):
        begun = [sizes for sizes in read_json(run_dir / "run.json")["rounds"] if {*sizes} <= {*left}]
        sizes, at_once = (begun[0], len(begun[0])) if begun else (left, _at_once(config))
        own = replace(config, block_sizes=tuple(sizes), out=run_dir)
        done, each = len(config.block_sizes) - len(left), 1 / len(config.block_sizes)
        bar.part(done * each, (done + len(sizes)) * each)
        if config.live_server:
            bar.stage("start")
            most_s = config.live.start_timeout_s
            bar.at(0.0, f"starting {len(sizes)} vLLM, {most_s:.0f} s at most; log in {run_dir}")
        with resolve(own, run=run_dir.name, at_once=at_once) as found:
            _note(run_dir, found)
            _publish(config, run_dir)
            if found.setups:
                work(found)
        _publish(config, run_dir)
        if not config.live_server:
            break
    if read_json(run_dir / "run.json")["engine"] is None:
        raise UnsupportedError(
            f"--block-sizes {' '.join(map(str, config.block_sizes))}: the server supports none of them"
        )


def expected_s(config: LearnConfig) -> dict[str, float]:
    """Seconds of each stage of a training, by what they took on two cores; only their shares matter long."""
    sizes, tuned = len(config.block_sizes), config.tuning_seeds / 8
    turns = sizes if config.live_server else max(1.0, sizes / 2)  # block sizes are side by side
    per_s = float(config.nodes_per_trial) if config.live_server else 4000.0 if branches(config) else 400.0
    return {
        "start": 120.0 * turns if config.live_server else 10.0,
        "baselines": turns * (5.0 + 28.0 * tuned),
        "training": turns * (12.0 + config.steps / per_s),
        "scoring": turns * config.train.iterations * 1.5 * tuned,
        "anchors": turns * 6.0 * tuned,
    }


@contextmanager
def shown(run_dir: Path, bar: Bar, name: str) -> Iterator[None]:
    """A stage of a run, on its bar and with its seconds in run.json."""
    bar.stage(name)
    with stage(run_dir, name):
        yield


def _check(config: LearnConfig, workloads: Sequence[str]) -> None:
    """Try what can be tried without a server."""
    algorithm_of(config)
    check_trackers(config.callbacks)
    for workload in workloads:
        parse_workload(workload)
    _check_pack_of_start(config)
    if config.baselines is not None and config.resume is None:  # later the run has its own
        read_baselines(config.baselines, config.block_sizes, workloads)
    if config.node == "ray":
        start_ray(config)
    if config.node == "live":
        spec = build_spec(config, config.block_sizes[0])
        check_start(config, build_codec(twinned(config, [spec]), spec))
    for size in () if config.live_server else config.block_sizes:
        spec = build_spec(config, size)
        config.guard.rules(config.slo, spec)
        check_start(config, build_codec(config, spec))
        for workload in workloads:
            build_node(twin_of(config), size, horizon_s=float(EPISODE_S), workload=workload).reset(seed=0)


def check_start(config: LearnConfig, codec: Codec) -> None:
    """The policy that training begins with has to see and to choose the same."""
    if config.start_from is None:
        return
    start = read_policy(config.start_from, extra_features=config.extra_features)
    seen = replace(start.codec, miss_price_j=codec.miss_price_j)  # the price is found after training
    if start.manifest.head != config.train.head or seen.to_dict() != codec.to_dict():
        raise PolicyError(
            f"--start-from {config.start_from}: that policy has other features, scales, SLO, action grid or "
            f"head than this training; it has {len(start.codec.grid)} actions, this training "
            f"{len(codec.grid)}"
        )


def _check_pack_of_start(config: LearnConfig) -> None:
    if config.start_from is None:
        return
    start = read_policy(config.start_from, extra_features=config.extra_features)
    try:
        check_pack(
            start.path, start.manifest, pack=load_pack(config.pack), allow_mismatch=config.allow_mismatch
        )
    except PolicyError as error:
        raise PolicyError(f"--start-from {error}") from error


def _new_run(config: LearnConfig, verb: str, held_out: Sequence[int]) -> Path:
    """Make the run's folder and write what is known of it beforehand."""
    run_dir = new_folder(config.out, verb)
    pack = load_pack(config.pack)
    facts = {
        "config": {**to_dict(config), "backend": "live" if config.live_server else "sim"},
        **origin(verb),
        "seeds": {
            "training": f"drawn from seed {config.seed}",
            "tuning": list(TUNING_SEEDS[: config.tuning_seeds]),
            "held_out": list(held_out),
        },
        "pack": {
            "name": pack.name,
            "sha256": pack.sha256,
            "notes": f"Measured: {pack.measured}. Transferred: {pack.transferred}.",
            "clock_axis_notes": pack.clock_axis_notes,
        },
        "rounds": [],
        "engine": None,
        "unsupported": {},
        "nodes": {},
    }
    write_json(run_dir / "run.json", facts)
    _publish(config, run_dir)
    return run_dir


def _publish(config: LearnConfig, run_dir: Path) -> None:
    if config.storage is not None:
        publish(run_dir, config.storage)


def _left(config: LearnConfig, table: Path) -> tuple[int, ...]:
    """Block sizes that are not finished yet, nor refused."""
    if not config.live_server:
        return config.block_sizes
    done = {row["block_size"] for row in read_csv(table)}
    done |= read_json(table.parent / "run.json")["unsupported"].keys()
    return tuple(size for size in config.block_sizes if str(size) not in done)


def _at_once(config: LearnConfig) -> int:
    """Block sizes that have nodes at the same time, by what the cluster has at this moment."""
    if config.node == "ray":
        return max(
            1, min(len(config.block_sizes), num_nodes(gpus_per_node(config)) // config.nodes_per_trial)
        )
    return 1 if config.live_server else len(config.block_sizes)


def _note(run_dir: Path, found: Resolved[Learning]) -> None:
    facts = read_json(run_dir / "run.json")
    if (sizes := list(found.setups)) not in [[], *facts["rounds"]]:
        facts["rounds"].append(sizes)
    facts["unsupported"] |= {str(size): why for size, why in found.unsupported.items()}
    facts["nodes"] |= {str(size): asdict(setup.spec) for size, setup in found.setups.items()}
    facts["engine"] = next((setup.engine for setup in found.setups.values()), facts["engine"])
    write_json(run_dir / "run.json", facts)
