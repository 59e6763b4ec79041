"""RLlib's checkpoints, as far as a policy needs them: weights out of a pickle that may hold nothing else."""

import pickle
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.errors import PolicyError
from fuel_ray.flags import NOT_NAMED
from fuel_ray.policies.learned import PolicyFolder, read_policy

MODULE_STATE = Path("learner_group/learner/rl_module/default_policy/module_state.pkl")
MAX_BYTES = 2**28
EXPORT_S = 120.0  # imports on a busy machine
_TARGET = "_target_q."

# All that numpy's arrays in a dict need; the module is numpy.core before numpy 2
_ALLOWED = {
    *((module, name) for module in ("numpy._core.multiarray", "numpy.core.multiarray") for name in
      ("_reconstruct", "scalar")),
    *((module, "_frombuffer") for module in ("numpy._core.numeric", "numpy.core.numeric")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("collections", "OrderedDict"),
}  # fmt: skip


class _ArraysOnly(pickle.Unpickler):
    """Refuses every class and function that an array does not need, so that nothing can be run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which weights do not need")
        return super().find_class(module, name)


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a checkpoint of RLlib's that has weights."""
    return (folder / MODULE_STATE).is_file()


def policy_folder(path: Path, *, extra_features: tuple[str, ...] = ()) -> PolicyFolder:
    """The policy in a folder; a checkpoint is converted in another process, which loads the simulator.

    Raises:
        PolicyError: it is neither, or malformed.
    """
    if not is_checkpoint(path):
        return read_policy(path, extra_features=extra_features)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fuel_ray", "export", "--checkpoint", str(path), "--out", folder]
        command += ["--extra-features", *extra_features] if extra_features else []
        beforehand = f"; convert it first: fuel-ray export --checkpoint {path}"
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=EXPORT_S)
        except subprocess.TimeoutExpired as error:
            raise PolicyError(f"{path}: the conversion took more than {EXPORT_S:g} s{beforehand}") from error
        if done.returncode:
            why = done.stderr.strip().removeprefix("fuel-ray: ") or f"{command} failed"
            raise PolicyError(why + (beforehand if NOT_NAMED in why else ""))
        return replace(read_policy(Path(folder), extra_features=extra_features), path=path)


def q_network(checkpoint: Path) -> dict[str, np.ndarray]:
    """The target network of a checkpoint: the average of the last Q networks, by their parameters' names.

    A checkpoint without one gives the Q network itself.

    Raises:
        PolicyError: there is none, or its file holds more than arrays.
    """
    path = checkpoint / MODULE_STATE
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        with path.open("rb") as file:
            state = _ArraysOnly(file).load()
        prefix = _TARGET if any(name.startswith(_TARGET) for name in state) else "q."
        found = {name: array for name, array in state.items() if name.startswith(prefix)}
        arrays = {name.removeprefix(prefix): np.asarray(array) for name, array in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, KeyError, IndexError) as error:
        raise PolicyError(f"{path}: {error}") from error
    except (pickle.UnpicklingError, ImportError, MemoryError, RecursionError) as error:
        raise PolicyError(f"{path} does not contain the weights of a checkpoint: {error}") from error
    if not arrays or any(array.dtype.kind != "f" for array in arrays.values()):
        raise PolicyError(f"{path} has no Q network that this version can read")
    return arrays
