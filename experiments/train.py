r"""Trains a recogniser, or continues where it stopped.

  python -m experiments.train --config=experiments/configs/X.py \
    --config.data.train=MANIFEST --config.data.dev=MANIFEST --workdir=DIR
"""

import os
import pathlib

from absl import flags
from ml_collections import config_flags

from experiments.wiring import command
from experiments.wiring import hosts
from u2moe_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Experiment file; --config.KEY=VALUE overrides a key.'
)
flags.mark_flag_as_required('config')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder for checkpoints, logs and the model.', required=True
)
_STRICT = flags.DEFINE_bool(
  'strict', False, 'Stop if any utterance cannot be used.'
)
_PROFILE_STEPS = flags.DEFINE_string(
  'profile_steps', '', 'FIRST:LAST steps to trace into WORKDIR/profile.'
)
_LOG_KEYS = flags.DEFINE_bool(
  'log_keys', False, 'Write the utterances of every step to WORKDIR/keys.jsonl.'
)
hosts.define_flags()


def main(_: list[str]) -> int:
  """Trains; exit codes in docs/exit_codes.md."""
  cache = pathlib.Path(_WORKDIR.value).absolute() / 'cache' / 'jax'
  # JAX reads it when it is imported. A run that continues compiles nothing.
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache))
  # Before anything touches a device: afterwards processes cannot join.
  hosts.start()
  # Imported here, so that --help and bad flags answer at once.
  from experiments.wiring import training
  from u2moe_jax.training import loop
  from u2moe_jax.training import profiling

  options = loop.Options(
    profile_steps=profiling.parse_steps(_PROFILE_STEPS.value),
    log_keys=_LOG_KEYS.value,
  )
  config = config_lib.from_dict(config_lib.Config, _CONFIG.value.to_dict())
  done = training.train(
    config, _WORKDIR.value, strict=_STRICT.value, options=options
  )
  return command.OK if done else command.INTERRUPTED


if __name__ == '__main__':
  command.run(main)
