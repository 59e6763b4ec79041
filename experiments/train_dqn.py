"""Train one DQN per KV block size (the same as ``fuel-ray train``)."""

import sys

from fuel_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
