"""Everything fuel_ray raises on purpose. No class has an __init__, so that Ray can pickle them."""


class FuelRayError(Exception):
    """Base of all errors that fuel_ray raises on purpose."""


class ConfigError(FuelRayError):
    """A flag, a file or a value from the user is wrong; the message names it and what is allowed."""


class NodeError(FuelRayError):
    """A node could not be set or measured."""


class PolicyError(FuelRayError):
    """A policy folder is malformed or does not fit the node it is loaded for."""
