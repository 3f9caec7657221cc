"""Averages checkpoints of a work directory into a model directory.

python -m experiments.average_checkpoints --workdir=DIR --num=5 --out=MODEL
"""

from absl import flags

from experiments.wiring import command

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'A training work directory.', required=True
)
_NUM = flags.DEFINE_integer('num', 5, 'How many.', lower_bound=1)
_BY = flags.DEFINE_enum(
  'by', 'wer', ['wer', 'newest'], 'Lowest dev WER, or the last ones.'
)
_STEPS = flags.DEFINE_list('steps', [], 'Exactly these steps.')
_OUT = flags.DEFINE_string('out', None, 'Model folder to write.', required=True)


def main(_: list[str]) -> int:
  """Averages; exit codes in docs/exit_codes.md."""
  from experiments.wiring import averaging

  steps = averaging.average(
    _WORKDIR.value,
    _OUT.value,
    num=_NUM.value,
    by=_BY.value,
    steps=_STEPS.value,
  )
  print(f'wrote {_OUT.value} (average of steps {steps})')
  return command.OK


if __name__ == '__main__':
  command.run(main)
