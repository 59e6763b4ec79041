"""Train one DQN per KV block size and compare it with the baselines (the same as ``fuel-ray sweep``)."""

import sys

from fuel_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
