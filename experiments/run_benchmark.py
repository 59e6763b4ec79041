"""Benchmark a running vLLM server (the same as ``fuel-ray benchmark``)."""

import sys

from fuel_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
