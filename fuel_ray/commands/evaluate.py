"""Evaluate policies on held-out seeds: the verb, and what a sweep calls."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fuel_ray.arena.config import EvaluateConfig
from fuel_ray.arena.evaluation import Evaluation, comparison, evaluate_policies, static_name
from fuel_ray.build.nodes import build_spec
from fuel_ray.codec import parse_knobs
from fuel_ray.config import to_dict
from fuel_ray.disk import write_or_keep
from fuel_ray.errors import ConfigError, UnsupportedError
from fuel_ray.flags import parse_serving, validate_tune_share
from fuel_ray.policies.catalogue import CATALOGUE
from fuel_ray.policies.static import Static
from fuel_ray.record import csv_text, new_folder, origin
from fuel_ray.tuning.contenders import check, check_sizes, of_size
from fuel_ray.tuning.tuned import tuned_policies
from fuel_ray.types import NodeSpec, Policy


def parse(argv: list[str], *, prog: str) -> EvaluateConfig:
    """Settings from flags."""
    config = parse_serving(EvaluateConfig, argv, prog=prog)
    if not config.static:
        raise ConfigError(
            "--static is empty: give at least one of max, LIMIT, LIMIT@MHZ, such as --static max"
        )
    specs: list[NodeSpec] = []
    if config.node != "ray" or not config.live_server:  # those of a cluster say it once they are there
        spec = build_spec(config, config.block_sizes[0])
        for text in config.static:
            _static(text, spec)
        specs = [replace(spec, kv_block_size=size) for size in config.block_sizes]
    check("--policies", config.policies, config, specs)
    check_sizes("--policies", config.policies, config.block_sizes)
    if any(entry in CATALOGUE and CATALOGUE[entry].tuned for entry in config.policies):
        validate_tune_share(config.tune_share, config.slo_share)
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
    except BaseException as error:
        facts["ended"] = " ".join(str(error).split()) or "interrupted"
        raise
    finally:
        _keep(config, run_dir, facts, evaluation)
    return 0


def _keep(config: EvaluateConfig, run_dir: Path, facts: dict[str, Any], evaluation: Evaluation) -> None:
    """Print and write the episodes that there are."""
    files = {"run.json": json.dumps(facts, indent=2)}
    if evaluation.rows:
        files["summary.csv"] = csv_text(evaluation.rows)
        files["steps.jsonl"] = "".join(f"{line}\n" for line in evaluation.lines)
        print(f"\n{comparison(evaluation.rows, config, partial=facts['partial'])}\n", flush=True)
    if "ended" in facts:
        print(f"stopped early ({facts['ended']}); {len(evaluation.rows)} episodes were saved")
    write_or_keep(run_dir, files | {f"traces/{name}": text for name, text in evaluation.traces.items()})
    if evaluation.rows:
        print(f"wrote {run_dir}")


def _one_block_size(
    config: EvaluateConfig, kv_block_size: int, evaluation: Evaluation, unsupported: dict[str, str]
) -> None:
    entries, say = of_size(config.policies, kv_block_size), partial(print, flush=True)

    def policies(spec: NodeSpec) -> dict[str, Policy]:
        static = {static_name(text): _static(text, spec) for text in config.static}
        share = config.tune_share
        return {**static, **tuned_policies(config, config.workload, spec, entries, share=share, say=say)}

    try:
        evaluate_policies(
            config,
            kv_block_size,
            config.workload,
            policies,
            seeds=config.seeds,
            seconds=config.seconds,
            into=evaluation,
            say=say,
            traces=config.save_traces or config.live_server,
        )
    except UnsupportedError as error:
        unsupported[str(kv_block_size)] = str(error)
        print(f"unsupported  {error}", flush=True)


def _static(text: str, spec: NodeSpec) -> Static:
    try:
        return Static(parse_knobs(text, spec))
    except ConfigError as error:
        raise ConfigError(f"--static {error}") from error
