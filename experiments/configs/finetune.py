r"""Goes on from a model directory, with its sizes, features and tokens.

Command:
  python -m experiments.train \
    --config=experiments/configs/finetune.py:MODEL \
    --config.data.train=TRAIN.jsonl --config.data.dev=DEV.jsonl \
    --workdir=WORKDIR
Hardware: that of MODEL's size.
Expected: starts at the error rate of MODEL; untuned.
"""

from experiments.configs import base
from u2moe_jax import config as config_lib


def get_config(folder: str = ''):
  """The experiment; `folder` is what stands behind the colon."""
  if not folder:
    return base.config_dict(_config())
  from u2moe_jax.checkpoint import directory

  found = directory.find(folder)
  data = config_lib.DataConfig(
    features=found.description.features, tokens=str(found.tokens or '')
  )
  return base.config_dict(
    _config(model=found.description.model, data=data, init_from=folder)
  )


def _config(*, init_from: str = '', **parts) -> config_lib.Config:
  return config_lib.Config(
    **parts,
    # A tenth of the recipe's rate: the weights are good already.
    optimizer=config_lib.OptimizerConfig(
      learning_rate=1e-4, schedule='cosine', warmup_steps=500
    ),
    train=config_lib.TrainConfig(
      num_steps=10000, save_every=500, init_from=init_from
    ),
  )
