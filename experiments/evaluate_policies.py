"""Compare all policies on all workloads (the same as ``fuel-ray arena``)."""

import sys

from fuel_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["arena", *sys.argv[1:]]))
