r"""AISHELL-1 170 h, U2++ Conformer, 8 experts (top-2) in each FFN.

Command:
  python -m experiments.train --config=experiments/configs/aishell_u2pp_moe.py \
    --config.data.train=DIR --config.data.dev=DIR:dev --workdir=WORKDIR
Hardware: 8 accelerators; not run here.
Expected: no published figure for the MoE form; of the dense form the reference
  published CER 4.63 % with full context, 5.05 % at chunk 16 (rescoring).
"""

from experiments.configs import aishell_u2pp
from experiments.configs import base


def get_config():
  """The experiment."""
  return base.with_experts(aishell_u2pp.get_config(), num_experts=8)
