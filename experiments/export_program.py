r"""Exports a model as programs that need no model code.

  python -m experiments.export_program --checkpoint=MODEL --out=DIR \
    --chunk_size=16 --left_chunks=4

DIR gets whole utterances to CTC log-probabilities, the same for one chunk of
any number of streams, and their parameters (docs/inference.md). The exported
programs then answer beside the model; what differs is printed.
"""

from absl import flags

from experiments.wiring import command

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'Model folder of any form, work directory, or one of its steps.',
  required=True,
)
_OUT = flags.DEFINE_string('out', None, 'Folder to write.', required=True)
_CHUNK_SIZE = flags.DEFINE_integer(
  'chunk_size', 16, 'Encoder frames per chunk of the streaming program.'
)
_LEFT_CHUNKS = flags.DEFINE_integer(
  'left_chunks', 4, 'Chunks of left context it keeps.'
)
# Of log-probabilities; what rounding gives stays far below it.
_MOST = 1e-2


def main(_: list[str]) -> int:
  """Exports and compares; exit codes in docs/exit_codes.md."""
  from u2moe_jax.decoding import exporting

  difference = exporting.export(
    _CHECKPOINT.value,
    _OUT.value,
    chunk_size=_CHUNK_SIZE.value,
    left_chunks=_LEFT_CHUNKS.value,
  )
  print(f'wrote {_OUT.value}; differs from the model by {difference:.1e}')
  return command.OK if difference <= _MOST else command.FAILED


if __name__ == '__main__':
  command.run(main)
