r"""The smallest U2++ MoE, for tests and `doctor`.

Command:
  python -m experiments.train --config=experiments/configs/tiny.py \
    --config.data.train=MANIFEST --workdir=WORKDIR
Hardware: anything; seconds.
Expected: it runs; it does not learn to read.
"""

from experiments.configs import base
from u2moe_jax import config as config_lib


def get_config():
  """The experiment."""
  return base.config_dict(
    config_lib.Config(
      model=base.u2pp(
        num_blocks=2,
        model_dim=16,
        num_heads=2,
        ffn_dim=32,
        conv_kernel=4,
        num_experts=4,
        decoder_blocks=1,
      ),
      data=config_lib.DataConfig(
        features=config_lib.FeatureConfig(num_mel_bins=20),
        batch_frames=1000,
        max_batch_size=4,
        num_buckets=1,
      ),
      optimizer=config_lib.OptimizerConfig(warmup_steps=10),
      train=config_lib.TrainConfig(
        num_steps=4, log_every=2, save_every=2, average_best=2
      ),
    )
  )
