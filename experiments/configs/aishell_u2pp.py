r"""AISHELL-1 170 h, U2++ Conformer.

Command:
  python -m experiments.train --config=experiments/configs/aishell_u2pp.py \
    --config.data.train=DIR --config.data.dev=DIR:dev --workdir=WORKDIR
Hardware: 8 accelerators; not run here.
Expected: CER 4.63 % full context, 5.05 % chunk 16 (rescoring), the reference's
  published figures.
"""

from experiments.configs import base
from u2moe_jax import config as config_lib


def get_config():
  """The experiment."""
  return base.config_dict(
    config_lib.Config(
      model=base.u2pp(
        num_blocks=12,
        model_dim=256,
        num_heads=4,
        ffn_dim=2048,
        conv_kernel=8,
        num_experts=0,
      ),
      data=config_lib.DataConfig(
        batch_frames=60000, max_batch_size=128, num_workers=8
      ),
      optimizer=config_lib.OptimizerConfig(
        learning_rate=1e-3, warmup_steps=25000
      ),
      train=config_lib.TrainConfig(num_steps=340000, average_best=30),
    )
  )
