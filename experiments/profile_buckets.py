r"""Finds batch sizes that fit a device, bucket by bucket, without running.

  python -m experiments.profile_buckets --config=experiments/configs/X.py \
    --config.data.train=MANIFEST --memory_gib=70 --out=sizes.json

Compiles the train step of each bucket, reads what the compiler says it takes
of one device, and solves for the largest batch below --memory_gib and
data.max_batch_size. Prints the flag that makes `train` use them.
"""

import json
import pathlib

from absl import flags
from ml_collections import config_flags

from experiments.wiring import command
from u2moe_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Experiment file; --config.KEY=VALUE overrides a key.'
)
flags.mark_flag_as_required('config')
_MEMORY_GIB = flags.DEFINE_float(
  'memory_gib',
  None,
  'What a step may take of one device; leave a tenth of the device free.',
  required=True,
  lower_bound=0.0,
)
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_GIB = 2**30


def main(_: list[str]) -> int:
  """Profiles; exit codes in docs/exit_codes.md."""
  # Imported here, so that --help and bad flags answer at once.
  from experiments.wiring import bucket_memory

  config = config_lib.from_dict(config_lib.Config, _CONFIG.value.to_dict())
  limit = int(_MEMORY_GIB.value * _GIB)
  print('frames tokens |  now     GiB | fits     GiB', flush=True)
  sizes: list[bucket_memory.Size] = []
  for size in bucket_memory.profile(config, limit):
    bucket = size.bucket
    print(
      f'{bucket.max_frames:6} {bucket.max_tokens:6} | {bucket.batch_size:4} '
      f'{size.bytes_before / _GIB:7.3f} | {size.rows:4} '
      f'{size.bytes / _GIB:7.3f}',
      flush=True,
    )
    # They come longest first; data.batch_sizes begins with the shortest.
    sizes.insert(0, size)
  rows = tuple(size.rows for size in sizes)
  flag = f"'--config.data.batch_sizes={rows}'"
  print(flag)
  if _OUT.value:
    _write(pathlib.Path(_OUT.value), sizes, flag)
  return command.OK


def _write(path: pathlib.Path, sizes, flag: str) -> None:
  tree = {
    'memory_gib': _MEMORY_GIB.value,
    'flag': flag,
    'batch_sizes': [size.rows for size in sizes],
    'buckets': [
      {
        'frames': size.bucket.max_frames,
        'tokens': size.bucket.max_tokens,
        'rows': size.rows,
        'gib': round(size.bytes / _GIB, 4),
        'rows_before': size.bucket.batch_size,
        'gib_before': round(size.bytes_before / _GIB, 4),
      }
      for size in sizes
    ],
  }
  # Under another name first: what reads the file gets all of it or none.
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(tree, indent=2) + '\n', encoding='utf-8')
  temporary.replace(path)


if __name__ == '__main__':
  command.run(main)
