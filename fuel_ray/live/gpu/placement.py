"""Whether a server runs on the cards that are measured and locked for it, as far as the driver tells."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.processes import are_ours_to_see, is_local, server_pids


@dataclass(frozen=True, slots=True)
class Placement:
    """What could be found out, and a sentence on it."""

    found: Literal["right", "wrong", "unknown"]
    text: str


def placement(gpus: Gpus, pids: Set[int]) -> Placement:
    """Of a server with these processes."""
    running, named = gpus.processes(), ", ".join(gpus.uuids)
    used = [uuid for uuid, there in running.items() if there & pids]
    if used:
        if set(used) == set(gpus.uuids):
            return Placement("right", f"the server runs on GPU {named}")
        return Placement(
            "wrong",
            f"the server runs on GPU {', '.join(used)}, but GPU {named} would be measured: "
            f"give --gpu-ids {' '.join(used)}",
        )
    others = frozenset[int]().union(*(running.get(uuid, ()) for uuid in gpus.uuids))
    if not others:
        return _unknown(named, "the driver reports no process on it")
    if not are_ours_to_see(others):
        return _unknown(named, "the driver reports processes outside this container only")
    pids_text = ", ".join(map(str, sorted(others)))
    return Placement(
        "wrong",
        f"no process of the server runs on GPU {named}, only others (pid {pids_text}); see nvidia-smi",
    )


def placement_of(gpus: Gpus, url: str) -> Placement:
    """Of the server at this URL, if its processes can be seen from here."""
    named = ", ".join(gpus.uuids)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        return _unknown(named, f"{url} is not a URL ({error})")
    if not is_local(host):
        return _unknown(named, f"{host} is another host")
    pids, why_not = server_pids(port)
    return placement(gpus, pids) if pids else _unknown(named, why_not)


def _unknown(named: str, reason: str) -> Placement:
    return Placement("unknown", f"cannot check whether the server runs on GPU {named}: {reason}")
