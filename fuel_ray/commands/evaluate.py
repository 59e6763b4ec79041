"""Evaluate policies on held-out seeds: the verb, and what a sweep calls."""

from dataclasses import replace
from functools import partial
from typing import Any

from fuel_ray.arena.config import EvaluateConfig
from fuel_ray.arena.evaluation import Evaluation, comparison, evaluate_policies
from fuel_ray.build.nodes import build_spec
from fuel_ray.codec import parse_knobs
from fuel_ray.config import to_dict
from fuel_ray.errors import ConfigError, UnsupportedError
from fuel_ray.flags import parse_serving
from fuel_ray.policies.learned import (
    distinct_names,
    load_policy,
    read_manifest,
)
from fuel_ray.policies.static import Static
from fuel_ray.record import new_folder, origin, write_csv, write_json, write_lines
from fuel_ray.types import NodeSpec, Policy


def parse(argv: list[str], *, prog: str) -> EvaluateConfig:
    """Settings from flags.

    Raises:
        ConfigError: a flag is wrong.
    """
    config = parse_serving(EvaluateConfig, argv, prog=prog)
    if not config.static or config.seeds < 1 or config.seconds < 1:
        raise ConfigError("--static needs at least one policy, --seeds and --seconds at least 1")
    for text in config.static:
        _static(text, build_spec(config, config.block_sizes[0]))
    for folder in config.policies:
        read_manifest(folder)
    return config


def run(config: EvaluateConfig) -> int:
    """Evaluate, print a table and write it; what there is when it is stopped is kept and marked partial."""
    run_dir = new_folder(config.out, "evaluate")
    facts: dict[str, Any] = {
        **origin("evaluate"),
        "config": to_dict(config),
        "origin": "measured" if config.live_server else "modelled",
        "unsupported": {},
        "partial": True,
    }
    config = replace(config, out=run_dir)
    evaluation = Evaluation([], [])
    try:
        for size in config.block_sizes:
            _one_block_size(config, size, evaluation, facts["unsupported"])
        facts["partial"] = False
    finally:
        write_json(run_dir / "run.json", facts)
        if evaluation.rows:
            write_csv(run_dir / "summary.csv", evaluation.rows)
            write_lines(run_dir / "steps.jsonl", evaluation.lines)
            print(f"\n{comparison(evaluation.rows, config, partial=facts['partial'])}\n\nwrote {run_dir}")
    return 0


def _one_block_size(
    config: EvaluateConfig, kv_block_size: int, evaluation: Evaluation, unsupported: dict[str, str]
) -> None:
    named = zip(distinct_names(config.policies), config.policies, strict=True)
    own = {name: f for name, f in named if kv_block_size in read_manifest(f).kv_block_sizes}

    def policies(spec: NodeSpec) -> dict[str, Policy]:
        policy = partial(load_policy, spec=spec, extra_features=config.extra_features)
        static = {f"static {text}": _static(text, spec) for text in config.static}
        return {**static, **{f"dqn {name}": policy(folder) for name, folder in own.items()}}

    try:
        evaluate_policies(
            config,
            kv_block_size,
            config.workload,
            policies,
            seeds=config.seeds,
            seconds=config.seconds,
            into=evaluation,
            say=lambda line: print(line, flush=True),
        )
    except UnsupportedError as error:
        unsupported[str(kv_block_size)] = str(error)
        print(f"unsupported  {error}", flush=True)


def _static(text: str, spec: NodeSpec) -> Static:
    try:
        return Static(parse_knobs(text, spec))
    except ConfigError as error:
        raise ConfigError(f"--static {error}") from error
