"""onboard.json: the settings of an onboarding and what each of its stages has found."""

import contextlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fuel_ray.config import to_dict
from fuel_ray.errors import ConfigError
from fuel_ray.record import origin, read_json, write_json

JOURNAL = "onboard.json"
SLO = ("slo_ttft_s", "slo_tpot_s", "slo_e2e_s", "slo_share")
OF_STAGE = {"load": ("workload",), "slo": ("workload", *SLO)}  # settings that may change until a training


class Journal:
    """The file in a folder; it is written whenever a stage begins or ends."""

    def __init__(self, folder: Path, config: Any) -> None:
        self._path = folder / JOURNAL
        facts = read_json(self._path) if self._path.exists() else {**origin("onboard"), "stages": {}}
        self._facts: dict[str, Any] = facts | {"config": to_dict(config)}
        for stage in _outdated(facts.get("config"), self._facts["config"]):
            self._facts["stages"].pop(stage, None)
        self._write()

    def found(self, stage: str) -> dict[str, Any]:
        """What a stage has found; nothing before its end."""
        found: dict[str, Any] = self._facts["stages"].get(stage, {}).get("found", {})
        return found

    def is_done(self, stage: str) -> bool:
        """Whether it has ended as it should."""
        return bool(self._facts["stages"].get(stage, {}).get("state") == "done")

    def began(self, stage: str) -> None:
        """A stage begins; what it was stopped by before is forgotten."""
        self._note(stage, {"state": "begun", "began": datetime.now().astimezone().isoformat("T", "seconds")})

    def ended(self, stage: str, found: Mapping[str, Any], *, seconds: float) -> None:
        """It is done."""
        self._note(stage, {"state": "done", "seconds": round(seconds, 1), "found": dict(found)})

    def stopped(self, stage: str, why: str, found: Mapping[str, Any]) -> None:
        """It ended before its end."""
        self._note(stage, {"state": "stopped", "why": why, "found": dict(found)})

    def _note(self, stage: str, facts: Mapping[str, Any]) -> None:
        before = self._facts["stages"].get(stage, {})
        kept = {"began": before["began"]} if "began" in before else {}
        self._facts["stages"][stage] = {**kept, **facts}
        self._write()

    def _write(self) -> None:
        write_json(self._path, self._facts)


def _outdated(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> tuple[str, ...]:
    """Stages whose settings have changed since."""
    if before is None:
        return ()
    changed = {name for name in now if before.get(name) != now[name]}
    return tuple(stage for stage, names in OF_STAGE.items() if changed & {*names})


def is_done(folder: Path, stage: str) -> bool:
    """Whether a stage of the onboarding in a folder is done; False where there is none."""
    with contextlib.suppress(ConfigError, AttributeError):
        return bool(read_json(folder / JOURNAL).get("stages", {}).get(stage, {}).get("state") == "done")
    return False
