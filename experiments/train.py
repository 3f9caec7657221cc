"""Trains a recogniser, or continues where it stopped.

  python -m experiments.train --config=experiments/configs/X.py \
    --config.data.train=MANIFEST --config.data.dev=MANIFEST --workdir=DIR
"""

from absl import flags
from ml_collections import config_flags

from experiments.wiring import command
from u2moe_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Experiment file; --config.KEY=VALUE overrides a key.'
)
flags.mark_flag_as_required('config')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder for checkpoints, logs and the model.', required=True
)


def main(_) -> int:
  """Trains; exit codes in docs/exit_codes.md."""
  # Imported here, so that --help and bad flags answer at once.
  from experiments.wiring import training

  config = config_lib.from_dict(config_lib.Config, _CONFIG.value.to_dict())
  done = training.train(config, _WORKDIR.value)
  return command.OK if done else command.INTERRUPTED


if __name__ == '__main__':
  command.run(main)
