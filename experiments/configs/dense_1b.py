r"""The dense model of the size of MoE-1B (1042.2 M).

20 blocks, D 1280, FFN 5120, 20 heads, kernel 15, 3 + 3 decoder layers, V 8000.

Command:
  python -m experiments.train --config=experiments/configs/dense_1b.py \
    --config.data.train=DIR --config.data.dev=DIR:dev --workdir=WORKDIR
Hardware: 32 accelerators of 80 GB or more; not run here.
Expected: no public figure for this shape.
"""

from experiments.configs import base
from u2moe_jax import config as config_lib


def get_config():
  """The experiment."""
  return base.config_dict(
    config_lib.Config(
      model=base.u2pp(
        num_blocks=20,
        model_dim=1280,
        num_heads=20,
        ffn_dim=5120,
        conv_kernel=15,
        vocab_size=8000,
      ),
      data=config_lib.DataConfig(batch_frames=36000, num_workers=8),
      optimizer=config_lib.OptimizerConfig(
        learning_rate=1e-3, warmup_steps=50000
      ),
      train=config_lib.TrainConfig(num_steps=500000, average_best=10),
    )
  )
