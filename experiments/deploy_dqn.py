"""Let a trained policy control a running vLLM server (the same as ``fuel-ray deploy``)."""

import sys

from fuel_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["deploy", *sys.argv[1:]]))
