"""JSON objects of files that people measured, whose numbers are checked as they are read."""

import math
from dataclasses import dataclass
from typing import Any

from fuel_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a file, and where it is."""

    values: dict[str, Any]
    where: str

    def number(self, *keys: str, above: float = 0.0, most: float = math.inf) -> float:
        """The number under the first of the keys that it has; it must be finite, and no more than ``most``.

        Raises:
            ConfigError: there is no such number.
        """
        if not isinstance(self.values, dict):
            raise ConfigError(f"{self.where}: must be an object with {keys[0]}")
        key = next((key for key in keys if key in self.values), keys[0])
        value: Any = self.values.get(key)
        if type(value) not in (int, float) or not above < value < math.inf:
            raise ConfigError(f"{self.where}: {key} is {value}; it must be a number above {above:g}")
        if value > most:
            raise ConfigError(f"{self.where}: {key} is {value}; it must be at most {most:g}")
        return float(value)

    def whole(self, key: str, *, most: float = math.inf) -> int:
        """A whole number above 0."""
        number = self.number(key, most=most)
        if number % 1:
            raise ConfigError(f"{self.where}: {key} is {number}; it must be a whole number")
        return int(number)
