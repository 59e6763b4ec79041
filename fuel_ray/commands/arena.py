"""Every policy on every workload: tuned on tuning seeds, compared on held-out ones, side by side."""

from dataclasses import replace

from fuel_ray.arena.config import ArenaConfig, check_tuning
from fuel_ray.arena.runner import all_cells, facts, publish
from fuel_ray.arena.scenarios import scenarios_of
from fuel_ray.build.nodes import build_spec
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_serving, resumed
from fuel_ray.record import make_folder, new_folder, read_json, write_json
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning.contenders import check, check_sizes, names_of

# Settings of a node that are not the user's here
_OF_SCENARIOS = (
    *("preset", "workload", "kv_tokens", "slo_ttft_s", "slo_tpot_s", "slo_e2e_s", "slo_share"),
    *("reward", "miss_price_j", "guard"),
)


def parse(argv: list[str], *, prog: str) -> ArenaConfig:
    """Settings from flags; with --resume, those of that run."""
    config = parse_serving(ArenaConfig, argv, prog=prog, default=ArenaConfig())
    if config.resume is not None:
        config = resumed(config.resume, argv, prog=prog, base=ArenaConfig(), may_change=("workers",))
    if config.node != "sim" or len(config.block_sizes) != 1:
        raise ConfigError(
            "arena runs on simulated nodes with one block size: give --node sim and one --block-sizes"
        )
    check_tuning(config, None)
    for name in _OF_SCENARIOS:
        if getattr(config, name) != getattr(ArenaConfig(), name):
            raise ConfigError(
                f"--{name.replace('_', '-')}: arena sets this itself; choose with --scenarios and --slos"
            )
    scenarios_of(config.scenarios)
    if not config.slos:
        raise ConfigError("--slos is empty: give at least one of interactive, tight, seed")
    _check_same_pack(config)
    check("--policies", config.policies, config, [build_spec(config, config.block_sizes[0])])
    check_sizes("--policies", config.policies, config.block_sizes)
    return replace(config, slos=tuple(dict.fromkeys(config.slos)))


def _check_same_pack(config: ArenaConfig) -> None:
    """Cells under two packs would be compared with each other."""
    if config.resume is None:
        return
    if read_json(config.resume / "run.json").get("pack_sha256") != load_pack(config.pack).sha256:
        raise ConfigError(
            f"--resume {config.resume}: calibration pack {config.pack} has changed since that arena began; "
            "start a new arena"
        )


def run(config: ArenaConfig) -> int:
    """Run or resume; prints progress and tables, and writes them."""
    run_dir = config.resume or new_folder(config.out, "arena")
    make_folder(run_dir / "cells")
    if config.resume is None:
        write_json(run_dir / "run.json", facts(config))
    cells = all_cells(config, run_dir)
    notes = load_pack(config.pack).clock_axis_notes
    print(f"\n{publish(cells, run_dir, names=names_of(config.policies), notes=notes)}")
    print(f"\nmodelled, pack {config.pack}, clock axis {config.clock_axis}; wrote {run_dir}")
    return 0
