"""``python -m fuel_ray VERB``."""

import sys

from fuel_ray.cli import main

sys.exit(main())
