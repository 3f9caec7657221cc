r"""LibriSpeech 960 h, U2++ Conformer, 8 experts (top-2) in each FFN.

Command:
  python -m experiments.train --config=experiments/configs/librispeech_u2pp_moe.py \
    --config.data.train=DIR --config.data.dev=DIR:dev --workdir=WORKDIR
Hardware: 8 accelerators; not run here.
Expected: no published figure for the MoE form; of the dense form the reference
  published WER 3.32 / 3.80 % on test-clean, 8.67 / 10.38 % on test-other
  (rescoring, full context / chunk 16).
"""

from experiments.configs import base
from experiments.configs import librispeech_u2pp


def get_config():
  """The experiment."""
  return base.with_experts(librispeech_u2pp.get_config(), num_experts=8)
