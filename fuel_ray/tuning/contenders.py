"""Who takes part: what a name, a folder or ``package.module:Class`` among --policies stands for."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fuel_ray.config import ServingConfig
from fuel_ray.errors import ConfigError
from fuel_ray.outside import made
from fuel_ray.policies.anchor import REACH_MHZ, WEIGHTS, Anchor
from fuel_ray.policies.catalogue import (
    CATALOGUE,
    CLOSER,
    OFFSETS_MHZ,
    PLAYABLE,
    Case,
    Contender,
    contender,
    untuned,
)
from fuel_ray.policies.learned import LearnedPolicy, distinct_names, load_policy, read_manifest
from fuel_ray.policies.packs import check_pack
from fuel_ray.policies.rules import Rule
from fuel_ray.policies.shipped import SHIPPED, folder_of
from fuel_ray.policies.static import LoadTable
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import Knobs, NodeSpec, Policy, Slo, WindowMetrics

LOG_PRICES = (0.7, 3.7)  # log10 of J per missed limit, between which a priced policy's is searched


def resolve(entry: str, case: Case) -> Contender:
    """The policy that an entry of --policies stands for; one in a folder is as it was trained."""
    if entry in PLAYABLE:
        return contender(entry, case)
    if is_folder(entry):
        return _as_is(entry, _load(entry, case))
    return Contender(entry, lambda _: made(entry, needs=("reset", "decide"), spec=case.spec, slo=case.slo))


def case_of(
    config: ServingConfig,
    spec: NodeSpec,
    *,
    slo: Slo | None = None,
    static: Knobs | None = None,
    table: LoadTable | None = None,
    rules: Mapping[str, LoadTable | Rule] | None = None,
    best_rule: LoadTable | Rule | None = None,
) -> Case:
    """What policies are made for on a node of these settings; None: as they say, and nothing tuned."""
    bare = untuned(
        spec,
        slo or config.slo,
        load_pack(config.pack, config.clock_axis),
        extra_features=config.extra_features,
    )
    return replace(
        bare,
        static=static or bare.static,
        table=table or bare.table,
        rules=rules or {},
        best_rule=best_rule,
    )


def check(flag: str, entries: Sequence[str], config: ServingConfig, specs: Sequence[NodeSpec]) -> None:
    """Check that what a flag names can be played on these nodes, before anything is run.

    Raises:
        ConfigError: an entry stands for no policy.
        PolicyError: a folder is malformed, made for another node or trained on another file of its pack.
    """
    try:
        for folder in (folder_of(entry) for entry in entries if is_folder(entry)):
            pack, allowed = load_pack(config.pack), config.allow_mismatch
            check_pack(folder, read_manifest(folder), pack=pack, allow_mismatch=allowed)
        for spec in specs:
            for entry in of_size(entries, spec.kv_block_size).values():
                resolve(entry, case_of(config, spec)).make(0.0)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error


def is_folder(entry: str) -> bool:
    """Whether an entry of --policies is a policy folder; ConfigError where it is nothing to be played."""
    if entry in PLAYABLE or (":" in entry and not folder_of(entry).exists()):
        return False
    if not folder_of(entry).is_dir():
        known = ", ".join((*SHIPPED, *PLAYABLE))
        raise ConfigError(
            f"unknown policy {entry}: give a policy folder, package.module:Class, or one of {known}"
        )
    return True


def names_of(entries: Sequence[str]) -> list[str]:
    """What the entries are called in tables: a folder by its own name where nothing else has it."""
    folders = [folder_of(entry) for entry in entries if is_folder(entry)]
    own = {str(folder): name for folder, name in zip(folders, distinct_names(folders), strict=True)}
    names = [own.get(str(folder_of(entry)), entry) for entry in entries]
    pairs = zip(names, entries, strict=True)
    return [name if name not in CATALOGUE or e in PLAYABLE else os.path.join(".", e) for name, e in pairs]


def of_size(entries: Sequence[str], kv_block_size: int) -> dict[str, str]:
    """Those that can play at a block size, by name: a folder was trained for some."""
    named = zip(names_of(entries), entries, strict=True)
    return {
        name: entry
        for name, entry in named
        if not is_folder(entry) or kv_block_size in read_manifest(folder_of(entry)).kv_block_sizes
    }


def check_sizes(flag: str, entries: Sequence[str], block_sizes: Sequence[int]) -> None:
    """Check that each entry can play at one of the block sizes; raises ConfigError."""
    played = {name for size in block_sizes for name in of_size(entries, size)}
    for name, entry in zip(names_of(entries), entries, strict=True):
        if name not in played:
            trained = read_manifest(folder_of(entry)).kv_block_sizes
            sizes, own = (", ".join(map(str, sizes)) for sizes in (block_sizes, trained))
            raise ConfigError(
                f"{flag} {name}: not trained for block size {sizes} (--block-sizes), but for {own}"
            )


def families(name: str, entry: str, case: Case) -> list[tuple[Contender, ...]]:
    """An entry's contenders, each as the variants of which the best on the tuning seeds takes part.

    For a policy folder the price of a miss is tuned where it was trained for many prices. One whose reward is
    energy is kept near the best simple rule, how near is tuned, unless its training left that out.
    """
    if not is_folder(entry):
        return [(resolve(entry, case),)]
    policy = _load(entry, case)
    manifest = read_manifest(folder_of(entry))
    free_of_rules = manifest.anchor is None and len(manifest.kv_block_sizes) == 1
    if manifest.reward != "energy" or free_of_rules:
        return [(free(name, policy, case.slo),)]
    lower = policy.anchor is not None and policy.anchor.lower_limits
    return [kept_near(name, policy, case.slo, case.best_rule or case.table, lower_limits=lower)]


def free(name: str, policy: LearnedPolicy, slo: Slo) -> Contender:
    """The policy as it was trained, with its price to be tuned; of one price, all its clocks are moved."""
    return _priced(name, policy.near(None), slo)


def kept_near(
    name: str, policy: LearnedPolicy, slo: Slo, rule: LoadTable | Rule, *, lower_limits: bool = False
) -> tuple[Contender, ...]:
    """The policy near this rule, a variant for each weight; with the largest it is the rule."""
    *loose, tight = WEIGHTS

    def as_rule(by: float) -> LearnedPolicy:
        return policy.near(Anchor(rule.moved(by), tight))

    anchors = (Anchor(rule, weight, REACH_MHZ, lower_limits) for weight in loose)
    near = (_priced(name, policy.near(anchor), slo) for anchor in anchors)
    dial = CLOSER if isinstance(rule, Rule) and rule.predicts else OFFSETS_MHZ
    return (*near, Contender(name, as_rule, dial, monotone=True, nominal=0.0))


def _as_is(name: str, policy: LearnedPolicy) -> Contender:
    return Contender(name, lambda _: policy)


def _priced(name: str, policy: LearnedPolicy, slo: Slo) -> Contender:
    if not policy.priced:
        return Contender(name, partial(_moved, policy), OFFSETS_MHZ, monotone=True, nominal=0.0)
    return Contender(name, lambda x: policy.for_slo(slo, miss_price_j=10.0**x), LOG_PRICES, True)


def _moved(policy: LearnedPolicy, by_mhz: float) -> Policy:
    return _Moved(policy, by_mhz) if by_mhz else policy


@dataclass(frozen=True, slots=True)
class _Moved:
    """A policy with all its clocks moved; the node takes the nearest ones that there are."""

    policy: Policy
    by_mhz: float

    def reset(self) -> None:
        self.policy.reset()

    def decide(self, window: WindowMetrics) -> Knobs:
        knobs = self.policy.decide(window)
        return replace(knobs, gpu_clock_mhz=max(round(knobs.gpu_clock_mhz + self.by_mhz), 1))


def _load(entry: str, case: Case) -> LearnedPolicy:
    return load_policy(folder_of(entry), case.spec, extra_features=case.extra_features)
