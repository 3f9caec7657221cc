"""Built-in spoken corpus, small U2++ MoE: the model of `make quickstart`.

Conformer with 4 experts (top-2) in both feed-forward layers of every block,
and in both decoders; 32 mel bins and few blocks, so that it trains on a
laptop.

Command:
  make quickstart
Hardware: 2 CPU cores, about 17 minutes of training.
Expected: WER on the built-in test split (synthetic speech), rescoring: see
  docs/results.md.
"""

from experiments.configs import base
from u2moe_jax import config as config_lib


def get_config():
  """The experiment."""
  return base.config_dict(
    config_lib.Config(
      # No dropout: ten epochs are too few to need it.
      model=base.u2pp(
        num_blocks=4,
        model_dim=144,
        num_heads=4,
        ffn_dim=288,
        conv_kernel=8,
        num_experts=4,
        decoder_blocks=2,
        dropout=0.0,
        subsampling_channels=72,  # as many as the width cost a sixth more
        scan_blocks=False,
      ),
      data=config_lib.DataConfig(
        # The engine is digitally silent between words: the floor stands where a
        # microphone's noise would.
        features=config_lib.FeatureConfig(
          num_mel_bins=32, dither=0.0, mel_floor=1000.0
        ),
        augment=config_lib.AugmentConfig(
          speeds=(0.95, 1.0, 1.05),
          num_time_masks=1,
          max_time_mask=10,
          num_freq_masks=1,
          max_freq_mask=4,
          num_substitutions=1,
          max_substitution=8,
        ),
        # CTC needs a blank between equal letters, for which frames of 40 ms
        # are coarse: THRE and COFE were a third of the errors.
        double_letters=True,
        short_first_epochs=1,
        batch_frames=4000,
        num_buckets=4,
        num_workers=1,
      ),
      optimizer=config_lib.OptimizerConfig(
        learning_rate=2e-3, schedule='cosine', warmup_steps=250
      ),
      train=config_lib.TrainConfig(
        num_steps=2650,
        ctc_weight=0.5,
        # Ten checkpoints, of which the three best are averaged.
        save_every=265,
        average_best=3,
      ),
      # A wide beam: CTC by characters errs in single letters, and the decoders
      # know how words are spelled. Beam and weight chosen on the dev split.
      decode=config_lib.DecodeConfig(beam=30, ctc_weight=0.7),
    )
  )
