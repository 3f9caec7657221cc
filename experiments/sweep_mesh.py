r"""Compares mesh shapes of an experiment before they are booked.

  python -m experiments.sweep_mesh --config=experiments/configs/moe_1b.py \
    --devices=64 --simulate --shapes=all --out=DIR

Compiles the train step of each shape ahead of time, in a process of its own:
compile time, bytes per device, collectives by kind, operations; and, on real
devices (without --simulate), step time, audio-seconds per second and MFU.
Writes sweep.json, sweep.csv, sweep.md and sweep.png into --out, anew after
each shape. A shape that fails is a row with its error; the same command goes
on where it was interrupted. docs/scaling.md explains the columns.
"""

import os
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from experiments.wiring import command
from u2moe_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Experiment file; --config.KEY=VALUE overrides a key.'
)
flags.mark_flag_as_required('config')
_OUT = flags.DEFINE_string('out', None, 'Folder to write.', required=True)
_DEVICES = flags.DEFINE_integer(
  'devices', None, 'How many devices.', required=True, lower_bound=1
)
_SIMULATE = flags.DEFINE_bool(
  'simulate', False, 'Simulate the devices on this host; nothing is run.'
)
_SHAPES = flags.DEFINE_string(
  'shapes',
  'all',
  'all, or a list as 8x1x1x1,2x1x4x1: data x fsdp x expert x tensor.',
)
_BATCH = flags.DEFINE_integer(
  'batch', 0, 'Utterances of all devices; 0: four for each.', lower_bound=0
)
_SECONDS = flags.DEFINE_float(
  'seconds', 10.0, 'Sound per utterance.', lower_bound=0.5
)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed steps.', lower_bound=1)
_TIMEOUT = flags.DEFINE_float(
  'timeout', 1800.0, 'Seconds for a shape, then it is a row with an error.'
)
_CHILD = flags.DEFINE_string(
  'child', '', 'Used by the script itself: the shape to look at, and stop.'
)


def main(_: list[str]) -> int:
  """Sweeps; exit codes in docs/exit_codes.md."""
  # As the user has it, for the children; this process overwrites its own.
  platforms = os.environ.get('JAX_PLATFORMS')
  if _SIMULATE.value and _CHILD.value:
    # XLA reads it when its CPU backend starts, so before JAX is imported.
    count = f'--xla_force_host_platform_device_count={_DEVICES.value}'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {count}'
  if _SIMULATE.value or not _CHILD.value:
    # The parent must not take the devices that its children need.
    os.environ['JAX_PLATFORMS'] = 'cpu'
  # Imported here, so that JAX sees the variables above.
  from experiments.wiring import mesh_sweep

  sweep = mesh_sweep.Sweep(
    config=config_lib.from_dict(config_lib.Config, _CONFIG.value.to_dict()),
    devices=_DEVICES.value,
    simulate=_SIMULATE.value,
    batch=_BATCH.value or 4 * _DEVICES.value,
    seconds=_SECONDS.value,
    repeats=_REPEATS.value,
  )
  if _CHILD.value:
    mesh_sweep.look_at(sweep, _CHILD.value, pathlib.Path(_OUT.value))
    return command.OK
  try:
    mesh_sweep.run(
      sweep,
      _SHAPES.value,
      pathlib.Path(_OUT.value),
      arguments=sys.argv[1:],
      platforms=platforms,
      timeout=_TIMEOUT.value,
    )
  except KeyboardInterrupt:
    print('interrupted; the same command goes on from here', file=sys.stderr)
    return command.INTERRUPTED
  return command.OK


if __name__ == '__main__':
  command.run(main)
