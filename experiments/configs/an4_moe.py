"""AN4, 33 minutes of real read speech, 4 experts (top-2) in every feed-forward layer.

Command:
  python -m experiments.train --config=experiments/configs/an4_moe.py \\
    --config.data.train=TRAIN.jsonl --config.data.dev=DEV.jsonl \\
    --workdir=WORKDIR
Hardware: 2 CPU cores, under an hour.
Expected: untuned; see docs/results.md.
"""

from experiments.configs import base
from u2moe_jax import config as config_lib


def get_config():
  """The experiment."""
  return base.config_dict(
    config_lib.Config(
      model=base.u2pp(
        num_blocks=6,
        model_dim=144,
        num_heads=4,
        ffn_dim=288,
        conv_kernel=15,
        num_experts=4,
        decoder_blocks=2,
        dropout=0.1,
      ),
      data=config_lib.DataConfig(
        features=config_lib.FeatureConfig(num_mel_bins=40),
        augment=config_lib.AugmentConfig(
          max_time_mask=25, max_freq_mask=7, max_substitution=20
        ),
        batch_frames=4000,
        num_buckets=4,
        num_workers=1,
      ),
      optimizer=config_lib.OptimizerConfig(
        learning_rate=2e-3, schedule='cosine', warmup_steps=300
      ),
      train=config_lib.TrainConfig(
        num_steps=4000, ctc_weight=0.5, save_every=250, average_best=5
      ),
    )
  )
