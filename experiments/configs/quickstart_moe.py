"""The same as `quickstart`, which is a Mixture-of-Experts already.

Command:
  make quickstart
Hardware: 2 CPU cores, about 17 minutes of training.
Expected: see `quickstart`.
"""

from experiments.configs import quickstart

get_config = quickstart.get_config
