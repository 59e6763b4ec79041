"""A policy without a folder, of the catalogue or from outside: it is watched, and never in control."""

from dataclasses import dataclass

from fuel_ray.errors import ConfigError
from fuel_ray.sim.pack import Pack, load_pack
from fuel_ray.types import NodeSpec, Policy, Slo


@dataclass(frozen=True, slots=True)
class Rule:
    """What --policy names, the SLO that it is given, and the calibration pack, if a model is at hand."""

    entry: str
    slo: Slo
    pack_name: str | None

    def check(self) -> None:
        """Raises ConfigError where it is nothing that can be watched."""
        if "/" in self.entry and ":" not in self.entry:
            raise ConfigError(
                f"--policy {self.entry}: there is no such folder; give a policy folder, such as "
                "results/sweep-.../policies/block_16"
            )
        from fuel_ray.policies.catalogue import SIMPLE, TUNED_STATIC  # noqa: PLC0415  (as below)
        from fuel_ray.tuning.contenders import is_folder  # noqa: PLC0415  (a folder does not wait for numba)

        if is_folder(self.entry) or self.entry in (TUNED_STATIC, *SIMPLE):
            raise ConfigError(
                f"--policy {self.entry}: this rule has to be tuned for a workload; `fuel-ray recommend "
                "--save FOLDER` does that and writes a policy folder"
            )

    def check_slo(self) -> None:
        """Raises ConfigError without an SLO by which it could be judged."""
        limits_s = [s for s in (self.slo.ttft_s, self.slo.tpot_s, self.slo.e2e_s) if s is not None]
        if not limits_s or not min(limits_s) > 0:
            raise ConfigError(
                f"--policy {self.entry}: a rule needs an SLO above 0 s, such as --slo-ttft-s 1 --slo-tpot-s "
                "0.05"
            )

    @property
    def pack(self) -> Pack | None:
        """The model of the server's GPU."""
        return None if self.pack_name is None else load_pack(self.pack_name)

    def policy(self, spec: NodeSpec) -> Policy:
        """The policy as published, at work on a node; ConfigError if it needs a model of the GPU."""
        from fuel_ray.policies.catalogue import untuned  # noqa: PLC0415  (as above)
        from fuel_ray.tuning.contenders import resolve  # noqa: PLC0415  (as above)

        contender = resolve(self.entry, untuned(spec, self.slo, self.pack))
        return contender.make(contender.settings[-1])
