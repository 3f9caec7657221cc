r"""AN4, 33 minutes of real read speech, 4 experts (top-2) in each FFN.

Command:
  python -m experiments.train --config=experiments/configs/an4_moe.py \
    --config.data.train=TRAIN.jsonl --config.data.dev=DEV.jsonl \
    --workdir=WORKDIR
Hardware: 2 CPU cores, under an hour.
Expected: untuned; see docs/results.md.
"""

from experiments.configs import an4
from experiments.configs import base


def get_config():
  """The experiment."""
  return base.with_experts(an4.get_config(), num_experts=4)
