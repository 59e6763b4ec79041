"""Measure a node for ``fuel-ray calibrate`` (the same as ``fuel-ray profile``)."""

import sys

from fuel_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]]))
