"""Writes a checkpoint in WeNet's forms.

  python -m experiments.export_wenet --checkpoint=MODEL --out=DIR

DIR gets final.pt and weights.npz (the same entries), train.yaml, global_cmvn,
and units.txt if there is one. PyTorch is not needed.
"""

from absl import flags

from experiments.wiring import command

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'Model folder, work directory, or one of its steps.',
  required=True,
)
_OUT = flags.DEFINE_string('out', None, 'Folder to write.', required=True)


def main(_: list[str]) -> int:
  """Exports; exit codes in docs/exit_codes.md."""
  from u2moe_jax.interop import wenet_directory

  notes = wenet_directory.export_model(_CHECKPOINT.value, _OUT.value)
  print('\n'.join(notes))
  return command.OK


if __name__ == '__main__':
  command.run(main)
