r"""Shows what a config makes of its training data, without a model.

  python -m experiments.inspect_data --config=experiments/configs/X.py \
    --config.data.train=MANIFEST --out=DIR

Prints, over the first epochs, what each compiled shape is used for, with the
shares of padded frames and tokens in rows that hold an utterance and of rows
that are empty; writes it to DIR/batches.json, and for some utterances
DIR/utterance-N.png: waveform, features, and features as a batch has them.
"""

import json
import os
import pathlib

from absl import flags
from ml_collections import config_flags

from experiments.wiring import command
from u2moe_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Experiment file; --config.KEY=VALUE overrides a key.'
)
flags.mark_flag_as_required('config')
_OUT = flags.DEFINE_string('out', None, 'Folder to write.', required=True)
_EPOCHS = flags.DEFINE_integer('epochs', 10, 'Epochs to count.', lower_bound=1)
_PICTURES = flags.DEFINE_integer(
  'pictures', 3, 'Utterances to draw; needs matplotlib.', lower_bound=0
)


def main(_: list[str]) -> int:
  """Inspects; exit codes in docs/exit_codes.md."""
  # Imported here, so that --help and bad flags answer at once.
  from experiments.wiring import inspection

  config = config_lib.from_dict(config_lib.Config, _CONFIG.value.to_dict())
  found = inspection.open_data(config)
  lines = inspection.table(inspection.count(found, epochs=_EPOCHS.value))
  print(inspection.summary(found))
  print(f'the first {_EPOCHS.value} epochs:')
  print(inspection.format_table(lines))
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  _write(out / 'batches.json', (json.dumps(lines, indent=2) + '\n').encode())
  if _PICTURES.value:
    _draw(found, out)
  return command.OK


def _draw(found, out: pathlib.Path) -> None:
  # Needs matplotlib, which the counts do without.
  from experiments.reporting import features
  from experiments.wiring import inspection

  examples = inspection.examples(found, _PICTURES.value)
  for number, example in enumerate(examples):
    path = out / f'utterance-{number}.png'
    _write(path, features.plot(example, found.config.data))
    print(f'{path}: {example.key}, {len(example.tokens)} tokens')


def _write(path: pathlib.Path, content: bytes) -> None:
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_bytes(content)
  os.replace(temporary, path)


if __name__ == '__main__':
  command.run(main)
