r"""Writes a checkpoint in the form that decodes fastest.

  python -m experiments.optimize_checkpoint --checkpoint=DIR --out=MODEL \
    --weights=float32

MODEL gives the same answers and can be decoded with, not trained: keep DIR.
float32 is exact; bfloat16 and int8 are smaller, and their answers differ a
little: score both before you choose (docs/inference.md).
"""

import typing

from absl import flags

from experiments.wiring import command

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'Model folder, work directory, or one of its steps.',
  required=True,
)
_OUT = flags.DEFINE_string('out', None, 'Model folder to write.', required=True)
_WEIGHTS = flags.DEFINE_enum(
  'weights',
  'float32',
  ['float32', 'bfloat16', 'int8'],
  'What parameters are stored as.',
)


def main(_: list[str]) -> int:
  """Converts; exit codes in docs/exit_codes.md."""
  from u2moe_jax.checkpoint import optimized
  from u2moe_jax.models import inference

  weights = typing.cast(inference.Weights, _WEIGHTS.value)
  found = optimized.optimize(_CHECKPOINT.value, _OUT.value, weights=weights)
  size = sum(file.stat().st_size for file in found.params.iterdir())
  print(f'wrote {_OUT.value} ({weights}, {size / 2**20:.1f} MiB)')
  return command.OK


if __name__ == '__main__':
  command.run(main)
