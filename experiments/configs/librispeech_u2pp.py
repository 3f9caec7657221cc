r"""LibriSpeech 960 h, U2++ Conformer.

Command:
  python -m experiments.train --config=experiments/configs/librispeech_u2pp.py \
    --config.data.train=DIR --config.data.dev=DIR:dev --workdir=WORKDIR
Hardware: 8 accelerators; not run here.
Expected: WER 3.32 / 3.80 % on test-clean, 8.67 / 10.38 % on test-other
  (rescoring, full context / chunk 16), the reference's published figures.
"""

from experiments.configs import base
from u2moe_jax import config as config_lib


def get_config():
  """The experiment."""
  return base.config_dict(
    config_lib.Config(
      model=base.u2pp(
        num_blocks=12,
        model_dim=512,
        num_heads=8,
        ffn_dim=2048,
        conv_kernel=31,
        num_experts=0,
      ),
      data=config_lib.DataConfig(
        token_type='bpe', batch_frames=36000, num_workers=8
      ),
      optimizer=config_lib.OptimizerConfig(
        learning_rate=1e-3, warmup_steps=25000
      ),
      train=config_lib.TrainConfig(num_steps=300000, average_best=10),
    )
  )
