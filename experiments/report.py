r"""Plots and a report of a training, also while it goes on.

  python -m experiments.report --workdir=runs/mine --manifest=test.jsonl

Writes WORKDIR/plots/*.png and WORKDIR/report.html: losses, learning rate and
gradient norm, throughput, the load of the experts; and, once there is a
checkpoint, what the model makes of one utterance of the manifest. Needs
matplotlib (requirements-dev.txt).
"""

import pathlib

from absl import flags

from experiments.wiring import command

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Work directory of the training.', required=True
)
_MANIFEST = flags.DEFINE_string(
  'manifest', None, 'Source of the utterance to look into; none without it.'
)


def main(_: list[str]) -> int:
  """Writes the report; exit codes in docs/exit_codes.md."""
  # Imported here, so that --help and bad flags answer at once.
  from experiments.wiring import reporting

  workdir = pathlib.Path(_WORKDIR.value)
  print(f'wrote {reporting.report(workdir, _MANIFEST.value)}')
  return command.OK


if __name__ == '__main__':
  command.run(main)
