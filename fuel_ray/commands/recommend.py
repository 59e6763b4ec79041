"""Which (block size, policy) pair to deploy for a load and an SLO; tuned static where none is better."""

from collections.abc import Iterator
from dataclasses import replace

from fuel_ray.arena.advice import LEGEND, line, recommendation
from fuel_ray.arena.config import RecommendConfig, check_tuning
from fuel_ray.arena.recommendation import Pair, by_size, save
from fuel_ray.build.nodes import build_spec
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_serving
from fuel_ray.policies.catalogue import label
from fuel_ray.policies.shipped import folder_of
from fuel_ray.progress import Bar
from fuel_ray.record import make_folder
from fuel_ray.report.wording import ascii_only
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning.contenders import check, is_folder, of_size
from fuel_ray.workload.spec import parse_workload

_SIZE_S = 60.0  # that a block size may take


def parse(argv: list[str], *, prog: str) -> RecommendConfig:
    """Settings from flags."""
    config = parse_serving(RecommendConfig, argv, prog=prog)
    if config.node != "sim":
        raise ConfigError(
            f"--node {config.node}: recommend compares policies on simulated nodes only; "
            "`fuel-ray evaluate` takes live ones"
        )
    if config.seeds < 2:
        raise ConfigError(f"--seeds {config.seeds}: must be at least 2, for an interval")
    check_tuning(config, config.slo_share)
    if not config.policies:
        raise ConfigError(
            "--policies is empty: give at least one, such as results/sweep-.../policies or example"
        )
    config = replace(config, policies=tuple(e for entry in config.policies for e in _entries(entry)))
    parse_workload(config.workload)
    check("--policies", config.policies, config, [build_spec(config, size) for size in config.block_sizes])
    if not any(of_size(config.policies, size) for size in config.block_sizes):
        sizes = ", ".join(map(str, config.block_sizes))
        raise ConfigError(f"--policies: no policy was trained for block size {sizes} (--block-sizes)")
    return config


def _entries(entry: str) -> Iterator[str]:
    """The entry itself, or the policy folders in it."""
    folder = folder_of(entry)
    if not is_folder(entry) or (folder / "manifest.json").is_file():
        yield entry
        return
    inside = sorted(str(path.parent) for path in folder.glob("*/manifest.json"))
    if not inside:
        raise ConfigError(
            f"--policies {entry}: neither a policy folder (there is no manifest.json) nor a folder of policy "
            "folders, such as results/sweep-.../policies"
        )
    yield from inside


def run(config: RecommendConfig) -> int:
    """Print every pair and the recommendation."""
    _, best, _ = recommended(config)
    if config.save is not None and best.fitted is not None:
        print(f"wrote {config.save}; to deploy: fuel-ray deploy --policy {config.save} ...")
    elif config.save is not None:
        print(f"nothing was written to {config.save}: {label(best.policy)} has no policy folder")
    elif best.fitted is not None:
        print("to deploy it: repeat this with --save DIR, then fuel-ray deploy --policy DIR --shadow")
    return 0


def recommended(config: RecommendConfig) -> tuple[list[Pair], Pair, str]:
    """Every pair, the one to deploy, which is saved if it can be, and a sentence on it; all are printed."""
    if config.save is not None:
        make_folder(config.save)
    pairs = sorted(_compared(config), key=lambda pair: config.block_sizes.index(pair.kv_block_size))
    print(LEGEND)
    best, sentence = recommendation(pairs, share=config.slo.share)
    if best.axes:
        print(f"\n{load_pack(config.pack).clock_axis_notes}")
    print("\n" + ascii_only(sentence))
    if config.save is not None and best.fitted is not None:
        save(best, best.fitted, config)
    return pairs, best, sentence


def _compared(config: RecommendConfig) -> Iterator[Pair]:
    """Every pair, each printed as soon as its block size is done."""
    sizes = len(config.block_sizes)
    with Bar({"compare": _SIZE_S * sizes / min(sizes, config.workers)}) as bar:
        bar.stage("compare")
        for number, found in enumerate(by_size(config), start=1):
            for pair in found:
                print(line(pair, found[0]), flush=True)
            yield from found
            bar.at(number / sizes, f"{number}/{sizes} block sizes")
