"""Fit the packs that come from published tables: clock x batch, no prefill.

    python benchmarks/table_packs.py FOLDER [--out fuel_ray/sim/packs]

The tables have no licence, so the packs hold constants and never rows.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from fuel_ray.sim.calibrate import DecodePoint, LeftOut, Profile, errors, fit, leave_one_out, table
from fuel_ray.sim.clock_axis import ClockAxis
from fuel_ray.sim.pack import PerfModel, load_pack, pack_fields

# What a batch of the A100 table is: so many steps that its batch-1 step takes what reading 16.1 GB of weights
# at 80 % of 1,555 GB/s takes, 12.9 ms; the table does not say how many tokens were asked for.
A100_STEPS = 600
STREAMING = 0.8  # share of the batch-1 step; no clock slows it in these packs
V100S_STEPS = 32  # 23 ms per step at batch 1; the repository does not say either


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("fuel_ray/sim/packs"))
    flags = parser.parse_args()
    base = load_pack("h100-qwen3-8b").perf
    write(flags.out, a100(), a100_profile(flags.folder / "a100_llama31_8b_vllm011.csv"), base)
    write(flags.out, v100s(), v100s_profile(flags.folder / "v100s_qwen7b_int4_hf.csv"), base)


def a100_profile(path: Path) -> Profile:
    points = [
        DecodePoint(
            seqs=int(row["batch_size"]),
            context_tokens=0.0,
            step_s=float(row["total_latency_sec"]) / A100_STEPS,
            power_w=float(row["avg_gpu_power_watts"]),
            clock_mhz=float(row["gpu_frequency_mhz"]),
        )
        for row in csv.DictReader(path.open())
        if float(row["total_latency_sec"]) > 6  # the others ended early
    ]
    return Profile(tuple(points), idle=((1410.0, 71.3),))  # what the powers point to at clock 0


def v100s_profile(path: Path) -> Profile:
    points = [
        DecodePoint(
            seqs=int(row["batch"]),
            context_tokens=0.0,
            step_s=float(row["time_s_per_batch"]) / V100S_STEPS,
            power_w=float(row["power_W"]),
            clock_mhz=float(row["freq_mhz"]),
        )
        for row in csv.DictReader(path.open())
        if row["source"].startswith("measured") and int(row["batch"]) <= 32  # 64 takes 3 x as long as 32
    ]
    return Profile(tuple(points), idle=((1597.0, 25.0),))


def a100() -> dict[str, Any]:
    """Everything that is not fitted; prefill by arithmetic: 2 x parameters x tokens / (peak x efficiency)."""
    prefill_s = 2 * 8.03e9 / (312e12 * 0.55)
    return {
        "name": "a100-llama31-8b",
        "gpu_name": "NVIDIA A100-PCIE-40GB",
        "architecture": "Ampere",
        "model": "Llama-3.1-8B",
        "engine": "vLLM 0.11",
        "gpu_clocks_mhz": {"min": 705, "max": 1410, "step": 15},
        "max_num_seqs": 64,
        "max_num_batched_tokens": 8192,
        "max_model_len": 8192,
        "kv_tokens": 128_000,
        "perf": {"power_cap_w": 250.0, "prefill_token_s": prefill_s, "prefill_token_j": 235 * prefill_s,
                 "prefill_attention_s": 4 * 32 * 4096 / (312e12 * 0.55), "mixed_token_s": prefill_s / 2,
                 "prefill_clock": 1.0, "stall_w": 110.0, "prefill_clock_share": 0.9},
        "measured": "time and power of whole batches: 15 clocks (705 to 1410 MHz) x 11 batches (1 to 64)",
        "transferred": "assumed: 600 output tokens per request, which sets the scale of every time (batch 1 "
            "then takes 12.9 ms per token, 80 % of the memory bandwidth); context is part of the cost per "
            "sequence, not a term of its own; prefill = 2 x 8.03e9 FLOP per token at 55 % of 312 TFLOP/s and "
            "235 W; KV pool; power cap of the PCIe card; launch times, front end and CPU of h100-qwen3-8b",
        "sources": ["github.com/qweewqq/EnergyLLM (PPO over clocks and batches), published model files: 159 "
                    "of 165 rows, those that ran to the end; fitted by benchmarks/table_packs.py"],
    }  # fmt: skip


def v100s() -> dict[str, Any]:
    prefill_s = 2 * 7.7e9 / (130e12 * 0.3)
    return {
        "name": "v100s-qwen7b-int4",
        "gpu_name": "Tesla V100S-PCIE-32GB",
        "architecture": "Volta",
        "model": "Qwen-7B-Chat-Int4",
        "engine": "Hugging Face transformers, static batches",
        "gpu_clocks_mhz": {"min": 517, "max": 1597, "step": 60},
        "max_num_seqs": 32,
        "max_num_batched_tokens": 8192,
        "max_model_len": 8192,
        "kv_tokens": 32_000,
        "perf": {"power_cap_w": 250.0, "prefill_token_s": prefill_s, "prefill_token_j": 235 * prefill_s,
                 "prefill_attention_s": 4 * 32 * 4096 / (130e12 * 0.3), "mixed_token_s": prefill_s / 2,
                 "prefill_clock": 1.0, "stall_w": 60.0, "prefill_clock_share": 0.9},
        "measured": "time and power of whole static batches: 10 clocks (517 to 1597 MHz) x batches 1 to 32, "
            "the rows marked measured",
        "transferred": "modelled is a server that batches continuously and whose steps cost what a step of a "
            "static batch of that size did; assumed: 32 output tokens per request, which sets the scale of "
            "every time; context is part of the cost per sequence; prefill = 2 x 7.7e9 FLOP per token at "
            "30 % of 130 TFLOP/s and 235 W; idle power 25 W; KV pool; launch times, front end and CPU of "
            "h100-qwen3-8b. Coarse: a clock left out of the fit is off by 4 to 29 % in time",
        "sources": ["github.com/HIT-HPC-Group/GreenDLS (DQN over clocks and batches), published "
                    "measurements; fitted by benchmarks/table_packs.py"],
    }  # fmt: skip


def write(folder: Path, raw: dict[str, Any], profile: Profile, base: PerfModel) -> None:
    highest_mhz = profile.clocks_mhz[-1]
    flat = ClockAxis((highest_mhz,), (1.0,), (1.0,), (1.0,))  # nothing is known of its idle power
    known = raw["perf"] | {"max_clock_mhz": highest_mhz, "decode_s": 1.0, "stream_s": STREAMING}
    start = PerfModel(base.constants._replace(**known), flat)
    perf = fit(profile, base=start).replace(**raw["perf"])
    path = folder / f"{raw['name']}.json"
    path.write_text(json.dumps(raw | pack_fields(perf), indent=2) + "\n")
    print(f"{path}, as fitted: {table(leave_none_out(profile, perf))}")
    print(f"{path}, left out, mean absolute error of time, power, energy:")
    print(table(leave_one_out(profile, base=start)))


def leave_none_out(profile: Profile, perf: PerfModel) -> list[LeftOut]:
    """Errors of the fit on its own rows, by clock."""
    groups = {mhz: [p for p in profile.decode if p.clock_mhz == mhz] for mhz in profile.clocks_mhz}
    return [LeftOut(f"{mhz:.0f} MHz", *errors(perf, points)) for mhz, points in groups.items()]


if __name__ == "__main__":
    main()
