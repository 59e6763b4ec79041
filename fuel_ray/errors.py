"""Everything fuel_ray raises on purpose. No class has an __init__, so that Ray can pickle them."""


class FuelRayError(Exception):
    """Base of all errors that fuel_ray raises on purpose."""


class ConfigError(FuelRayError):
    """A flag, a file or a value from the user is wrong; the message names it and what is allowed."""


class DiskError(FuelRayError, OSError):
    """A file or folder could not be written, for reasons of the machine; the message names it and why."""


class NodeError(FuelRayError):
    """A node could not be set or measured."""


class GpuError(NodeError):
    """A GPU or its driver is missing, lost or refused; the message names the GPU and what to do."""


class PrivilegeError(GpuError):
    """Setting clocks needs a privilege that this process lacks; the message names the command that has it."""


class TelemetryError(NodeError):
    """A reading is missing or wrong; the message names the metric, the device or the URL."""


class UnsupportedError(NodeError):
    """This vLLM and its backend cannot serve what was asked, such as a block size; the message says why."""


class PolicyError(FuelRayError):
    """A policy folder is malformed or does not fit the node it is loaded for."""
