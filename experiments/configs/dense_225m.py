r"""The paper's dense model (224.4 M).

15 blocks, D 640, FFN 2560, 10 heads, kernel 15, 3 + 3 decoder layers, V 8000:
one of the shapes that fit the published sizes, which are all that is known.

Command:
  python -m experiments.train --config=experiments/configs/dense_225m.py \
    --config.data.train=DIR --config.data.dev=DIR:dev --workdir=WORKDIR
Hardware: 8 accelerators of 80 GB or more; not run here.
Expected: no public figure for this shape.
"""

from experiments.configs import base
from u2moe_jax import config as config_lib


def get_config():
  """The experiment."""
  return base.config_dict(
    config_lib.Config(
      model=base.u2pp(
        num_blocks=15,
        model_dim=640,
        num_heads=10,
        ffn_dim=2560,
        conv_kernel=15,
        num_experts=0,
        vocab_size=8000,
      ),
      data=config_lib.DataConfig(batch_frames=36000, num_workers=8),
      optimizer=config_lib.OptimizerConfig(
        learning_rate=1e-3, warmup_steps=50000
      ),
      train=config_lib.TrainConfig(num_steps=500000, average_best=10),
    )
  )
