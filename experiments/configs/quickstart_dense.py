r"""The dense counterpart of `quickstart`: one expert's width everywhere.

Command:
  python -m experiments.quickstart --workdir=runs/quickstart_dense \
    --config=experiments/configs/quickstart_dense.py
Hardware: 2 CPU cores, about 15 minutes of training.
Expected: not measured yet; compare with docs/results.md.
"""

from experiments.configs import base
from experiments.configs import quickstart


def get_config():
  """The experiment."""
  return base.with_experts(quickstart.get_config(), num_experts=0)
