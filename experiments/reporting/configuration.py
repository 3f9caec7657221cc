"""Writes docs/configuration.md: every key, and what WeNet's keys are here.

  python -m experiments.reporting.configuration

The keys come from the docstrings of u2moe_jax/config.py, the dictionary from
the tables of u2moe_jax/interop/wenet_keys.py; a test says when the file is
out of date.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import inspect
import pathlib
import re
import typing
from typing import Any

from experiments.wiring import command
from u2moe_jax import config as config_lib
from u2moe_jax.interop import wenet_keys

FILE = pathlib.Path(__file__).parents[2] / 'docs' / 'configuration.md'

# Four spaces begin an entry of `Attributes:`; its further lines have six.
_ATTRIBUTE = re.compile(r'    (\w+): (.*)')

# Where the groups of the yaml have their place.
_OWNERS = {
  'encoder_conf': 'model.encoder',
  'decoder_conf': 'model.decoder',
  'ctc_conf': 'model',
  'model_conf': 'train',
  'dataset_conf.fbank_conf': 'data.features',
  'dataset_conf.resample_conf': 'data.features',
}

# Of training only; an import keeps them, and reads nothing of them.
_TRAINING = {
  'input_dim': 'model.feature_dim',
  'output_dim': 'model.vocab_size (of the token table)',
  'tokenizer: char, bpe': 'data.token_type',
  'tokenizer_conf.symbol_table_path, bpe_path': 'data.tokens',
  'tokenizer_conf.special_tokens': 'model.sos_id, model.eos_id',
  'cmvn_conf.cmvn_file': 'data.cmvn',
  'dataset_conf.filter_conf.max_length, min_length': (
    'data.max_seconds, data.min_seconds (frames there)'
  ),
  'dataset_conf.filter_conf.token_max_length': 'data.max_tokens',
  'dataset_conf.speed_perturb': 'data.augment.speeds',
  'dataset_conf.spec_aug_conf.num_t_mask, max_t': (
    'data.augment.num_time_masks, max_time_mask'
  ),
  'dataset_conf.spec_aug_conf.num_f_mask, max_f': (
    'data.augment.num_freq_masks, max_freq_mask'
  ),
  'dataset_conf.spec_sub_conf.num_t_sub, max_t': (
    'data.augment.num_substitutions, max_substitution'
  ),
  'dataset_conf.spec_trim_conf.max_t': 'data.augment.max_trim',
  'dataset_conf.shuffle_conf, sort_conf': (
    'none: each epoch is shuffled as a whole, and sorted into buckets'
  ),
  'dataset_conf.batch_conf.max_frames_in_batch': 'data.batch_frames',
  'dataset_conf.batch_conf.batch_size': 'data.max_batch_size',
  'optim: adam, adamw': 'optimizer.name',
  'optim_conf.lr': 'optimizer.learning_rate',
  'scheduler: warmuplr': 'optimizer.schedule=warmup_inverse_sqrt',
  'scheduler_conf.warmup_steps': 'optimizer.warmup_steps',
  'grad_clip': 'optimizer.clip_norm',
  'accum_grad': 'optimizer.accumulate',
  'max_epoch': 'train.num_steps (batches, not epochs)',
  'log_interval': 'train.log_every',
  'save_interval': 'train.save_every',
  'dtype': 'model.dtype',
}

_FLAGS = {
  'train.py --config, --override_config': 'train --config, --config.KEY=VALUE',
  'train.py --train_data, --cv_data': (
    'train --config.data.train, --config.data.dev'
  ),
  'train.py --model_dir': 'train --workdir',
  'train.py --checkpoint': (
    'train --config.train.init_from (the same --workdir continues)'
  ),
  'recognize.py --modes': 'decode --mode',
  'recognize.py --checkpoint, --config': (
    'import_wenet --weights, --config; then decode --checkpoint'
  ),
  'recognize.py --test_data, --result_dir': 'decode --manifest, --out',
  'recognize.py --beam_size': 'decode --beam',
  'recognize.py --length_penalty': 'decode --length_penalty',
  'recognize.py --blank_penalty': 'decode --blank_penalty',
  'recognize.py --ctc_weight': 'decode --ctc_weight',
  'recognize.py --reverse_weight': 'decode --reverse_weight',
  'recognize.py --decoding_chunk_size': 'decode --chunk_size',
  'recognize.py --num_decoding_left_chunks': 'decode --left_chunks',
  'recognize.py --simulate_streaming': 'decode --streaming',
  'average_model.py --src_path, --dst_model': (
    'average_checkpoints --workdir, --out'
  ),
  'average_model.py --num': 'average_checkpoints --num',
  'average_model.py --val_best': 'average_checkpoints --by=wer',
}

_INTRO = """\
# Configuration

Written by `python -m experiments.reporting.configuration`; edit
`u2moe_jax/config.py` instead.

An experiment file (`experiments/configs/`) sets keys, and
`--config.KEY=VALUE` overrides any of them: `--config.model.encoder.moe.top_k=1`.
An unknown key, a wrong type or a value out of range ends the script with one
line that names it.
"""

_FROM_WENET = """\
## From WeNet

`python -m experiments.import_wenet --weights=final.pt --config=train.yaml
--units=units.txt --out=MODEL` reads these keys, and `export_wenet` writes
them. A key of these groups that stands in none of the tables is an error, and
so is a weight without a place: nothing is taken over in part.

`--reference_quirks` reproduces two things that WeNet gets wrong, for numbers
that match in batches: through a non-causal convolution, padding reaches the
last frames of shorter utterances (`model.encoder.conv_padding_leak`), and
padded frames count in batch-norm training statistics
(`model.encoder.batch_norm_padding`). By default they do not, so that an
utterance means the same alone and in a batch; causal models with layer norm
are the same either way.
"""

_WEIGHTS = """\
### Weights

Every array has one place and comes back bit for bit. What nothing reads is
kept beside the model (`MODEL/wenet`) and returned by an export: batch-norm
counters (`num_batches_tracked`), position tables (`.pe`), and the right
decoder of `r_num_blocks: 0`. The scale of `cnn_module_norm: rms_norm` is one
plus the stored weight, there and here.

WeNet's checkpoints hold no optimizer state. A `.pt` from before PyTorch 1.6
has another form; the message says how to convert it.
"""


def text() -> str:
  """The whole file."""
  parts = [_INTRO, *_sections(config_lib.Config, ''), _FROM_WENET]
  kinds = [
    (f'`{key}`', ', '.join(f'`{kind}`' for kind in known))
    for key, known in wenet_keys.KINDS.items()
  ]
  parts.append(_table(('WeNet', 'what we have'), kinds))
  for group, keys in wenet_keys.GROUPS.items():
    parts += [f'### {group}\n', _group_table(group, keys)]
  parts += [
    '### Everything else\n',
    _table(('WeNet', 'here'), _TRAINING.items()),
    '### Command lines\n',
    _table(('WeNet', 'here (`python -m experiments.`)'), _FLAGS.items()),
    _WEIGHTS,
  ]
  return '\n'.join(parts)


def _sections(cls: type, path: str) -> Iterator[str]:
  """Heading and table of a config class, then those of its groups."""
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  meanings = attributes(cls)
  rows, groups = [], []
  for name, field in fields.items():
    key = f'{path}.{name}'.lstrip('.')
    if dataclasses.is_dataclass(hints[name]):
      groups.append((hints[name], key))
    else:
      rows.append((f'`{key}`', _default(field), meanings[name]))
  # The whole config has no name; its heading is that of the file.
  if path:
    what = (inspect.getdoc(cls) or '').splitlines()[0]
    yield f'## `{path}`\n\n{what}\n'
  if rows:
    yield _table(('key', 'default', 'meaning'), rows)
  # Behind the keys of this level, so that no table is torn apart.
  for group, key in groups:
    yield from _sections(group, key)


def attributes(cls: type) -> dict[str, str]:
  """What the docstring of a config class says of each key.

  Raises:
    ValueError: for a key without a line, or a line without a key.
  """
  meanings: dict[str, str] = {}
  name = ''
  for line in (cls.__doc__ or '').partition('Attributes:')[2].splitlines():
    match = _ATTRIBUTE.fullmatch(line)
    if match is not None:
      name = match[1]
      meanings[name] = match[2]
    elif name and line.startswith('      '):
      meanings[name] += ' ' + line.strip()
  hints = typing.get_type_hints(cls)
  # A group has a section of its own, so its line may be missing.
  plain = {k for k, hint in hints.items() if not dataclasses.is_dataclass(hint)}
  wrong = plain.symmetric_difference(set(meanings) & plain) | (
    set(meanings) - set(hints)
  )
  if wrong:
    raise ValueError(
      f'{cls.__name__}: {sorted(wrong)} differ from the docstring'
    )
  return meanings


def _default(field: dataclasses.Field) -> str:
  value = field.default
  if value in ('', ()):
    return '(empty)'
  if isinstance(value, tuple):
    return '`' + ', '.join(map(str, value)) + '`'
  return f'`{value}`'


def _group_table(group: str, keys: dict[str, wenet_keys.Key]) -> str:
  rows: list[tuple[Any, ...]] = [
    (f'`{key}`', f'`{_OWNERS[group]}.{spec.ours}`', f'`{spec.default}`')
    for key, spec in keys.items()
  ]
  if group in ('encoder_conf', 'decoder_conf'):
    rows += [
      (f'`{key}`', f'`{_OWNERS[group]}.moe.{spec.ours}`', f'`{spec.default}`')
      for key, spec in wenet_keys.MOE.items()
    ]
  for key, allowed in wenet_keys.FIXED[group].items():
    only = ' or '.join(f'`{value}`' for value in allowed)
    rows.append((f'`{key}`', f'only {only}', f'`{allowed[0]}`'))
  for key, reason in wenet_keys.IGNORED[group].items():
    if key not in wenet_keys.MOE:
      rows.append((f'`{key}`', reason, ''))
  return _table(('WeNet', 'here', "WeNet's default"), rows)


def _table(head: Sequence[str], rows: Any) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return ''.join(f'| {" | ".join(map(_cell, line))} |\n' for line in lines)


def _cell(content: Any) -> str:
  # A table's bar, and what a page would take for a tag.
  return str(content).replace('|', '\\|').replace('<', '&lt;')


def main(_: list[str]) -> int:
  """Writes the file."""
  FILE.write_text(text(), encoding='utf-8')
  print(f'wrote {FILE}')
  return command.OK


if __name__ == '__main__':
  command.run(main)
