r"""AN4, 33 minutes of real read speech.

Letters, digits and a few commands by 58 speakers: so little that everything
which makes it more counts (speeds, noise, masks, dropout, many epochs).

Command:
  python -m experiments.train --config=experiments/configs/an4.py \
    --config.data.train=TRAIN.jsonl --config.data.dev=DEV.jsonl \
    --workdir=WORKDIR
Hardware: 2 CPU cores, under an hour.
Expected: WER 10.0 % on the test split with rescoring, 10.5 % at chunk 16.
"""

from experiments.configs import base
from u2moe_jax import config as config_lib


def get_config():
  """The experiment."""
  return base.config_dict(
    config_lib.Config(
      model=base.u2pp(
        num_blocks=4,
        model_dim=144,
        num_heads=4,
        ffn_dim=288,
        conv_kernel=8,
        decoder_blocks=2,
        scan_blocks=False,
      ),
      data=config_lib.DataConfig(
        features=config_lib.FeatureConfig(num_mel_bins=32),
        augment=config_lib.AugmentConfig(
          noise_probability=0.3,
          noise_snr=(5.0, 25.0),
          volume_probability=0.3,
          max_time_mask=20,
          max_freq_mask=5,
          num_substitutions=1,
          max_substitution=10,
        ),
        double_letters=True,
        short_first_epochs=2,
        batch_frames=4000,
        num_buckets=4,
        num_workers=1,
      ),
      optimizer=config_lib.OptimizerConfig(
        learning_rate=2e-3, schedule='cosine', warmup_steps=300
      ),
      train=config_lib.TrainConfig(
        num_steps=7000, ctc_weight=0.5, save_every=250, average_best=5
      ),
      decode=config_lib.DecodeConfig(beam=20),
    )
  )
