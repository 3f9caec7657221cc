r"""The paper's Mixture-of-Experts model: 8 experts, top-2, in each FFN.

1051.2 M parameters, 342.7 M of them active per frame. 15 blocks, D 640, FFN 2560,
10 heads, kernel 15, 3 + 3 decoder layers, V 8000: one of the shapes that fit the
published sizes, which are all that is known.

Command:
  python -m experiments.train --config=experiments/configs/moe_1b.py \
    --config.data.train=DIR --config.data.dev=DIR:dev --workdir=WORKDIR
Hardware: 32 accelerators of 80 GB or more; not run here.
Expected: no public figure for this shape.
"""

from experiments.configs import base
from experiments.configs import dense_225m


def get_config():
  """The experiment."""
  return base.with_experts(dense_225m.get_config(), num_experts=8)
