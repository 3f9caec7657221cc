"""Built-in spoken corpus, small U2++ MoE: the model of `make quickstart`.

Conformer with 4 experts (top-2) in both feed-forward layers of every block,
and in both decoders; 40 mel bins and few blocks, so that it trains on a
laptop.

Command:
  make quickstart
Hardware: 2 CPU cores, about 15 minutes of training.
Expected: WER on the built-in test split (synthetic speech), rescoring: see
  docs/results.md.
"""

import dataclasses

from experiments.configs import base
from u2moe_jax import config as config_lib


def _model() -> config_lib.ModelConfig:
  model = base.u2pp(
    num_blocks=6,
    model_dim=96,
    num_heads=4,
    ffn_dim=192,
    conv_kernel=8,
    num_experts=4,
    decoder_blocks=1,
    dropout=0.05,
  )
  # Attention and position dropout cost a tenth of a step on CPU and bring
  # nothing in a training this short.
  encoder = dataclasses.replace(
    model.encoder,
    subsampling='conv2d',
    attention_dropout=0.0,
    positional_dropout=0.0,
  )
  decoder = dataclasses.replace(
    model.decoder,
    self_attention_dropout=0.0,
    cross_attention_dropout=0.0,
    positional_dropout=0.0,
  )
  return dataclasses.replace(model, encoder=encoder, decoder=decoder)


def get_config():
  """The experiment."""
  return base.config_dict(
    config_lib.Config(
      model=_model(),
      data=config_lib.DataConfig(
        features=config_lib.FeatureConfig(num_mel_bins=40),
        augment=config_lib.AugmentConfig(
          num_time_masks=1,
          max_time_mask=12,
          num_freq_masks=1,
          max_freq_mask=5,
          num_substitutions=1,
          max_substitution=10,
        ),
        short_first_epochs=1,
        batch_frames=4000,
        num_buckets=4,
        num_workers=1,
      ),
      optimizer=config_lib.OptimizerConfig(
        learning_rate=3e-3, schedule='cosine', warmup_steps=250
      ),
      train=config_lib.TrainConfig(
        num_steps=2700,
        ctc_weight=0.5,
        save_every=300,
        average_best=5,
      ),
    )
  )
