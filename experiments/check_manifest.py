r"""Looks through a corpus before anything is trained on it.

  python -m experiments.check_manifest --source=train.jsonl \
    --tokens=TOKENS --out=train_clean.jsonl

Takes any source of docs/data.md. Says how long the utterances are, which
sample rates and characters there are, what the token table lacks, and which
utterances cannot be used, by reason: missing, broken, empty or silent sound,
bad segments, transcripts that are missing, too long for CTC or not UTF-8,
duplicates. `--out` gets a manifest of the others, with durations, so that
training opens it at once. The last line printed is one JSON object of counts.
Exit code 1 says that nothing can be used.
"""

import json

from absl import flags
from ml_collections import config_flags

from experiments.wiring import command
from u2moe_jax import config as config_lib

_SOURCE = flags.DEFINE_string(
  'source', None, 'What to check, see docs/data.md.', required=True
)
_SPLIT = flags.DEFINE_string(
  'split', 'train', 'Taken where --source names no split.'
)
_OUT = flags.DEFINE_string('out', None, 'Manifest of what can be used.')
_TOKENS = flags.DEFINE_string(
  'tokens', None, 'Token table; without one, every character is a token.'
)
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Experiment file, for limits, features and subsampling.'
)
_SUBSAMPLING = flags.DEFINE_enum(
  'subsampling',
  None,
  ['conv2d', 'conv2d6', 'conv2d8'],
  'Of the encoder; that of --config, else conv2d.',
)
_MIN_SECONDS = flags.DEFINE_float(
  'min_seconds', None, 'Limit, instead of that of the config.'
)
_MAX_SECONDS = flags.DEFINE_float(
  'max_seconds', None, 'Limit, instead of that of the config.'
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, 'Limit, instead of that of the config.'
)
_DECODE = flags.DEFINE_bool(
  'decode', True, 'Decode all sound; --nodecode only reads headers.'
)
_WORKERS = flags.DEFINE_integer(
  'workers', None, 'Processes; one a core if not given, 0 for none but this.'
)


def _config() -> config_lib.Config:
  """The experiment's config, with the limits that flags give."""
  config = config_lib.Config()
  if _CONFIG.value is not None:
    config = config_lib.from_dict(config_lib.Config, _CONFIG.value.to_dict())
  given = {
    'data.min_seconds': _MIN_SECONDS.value,
    'data.max_seconds': _MAX_SECONDS.value,
    'data.max_tokens': _MAX_TOKENS.value,
    'model.encoder.subsampling': _SUBSAMPLING.value,
  }
  for key, value in given.items():
    # None is a flag that was not given; 0 is a limit.
    if value is not None:
      config = config_lib.replace(config, key, value)
  return config


def main(_: list[str]) -> int:
  """Checks; exit codes in docs/exit_codes.md."""
  # Imported here, so that --help and bad flags answer at once.
  from data_pipelines import check
  from data_pipelines import sources
  from u2moe_jax.layers import subsampling
  from u2moe_jax.text import tokenizer

  config = _config()
  geometry = subsampling.geometry(config.model.encoder.subsampling)
  settings = check.Settings(
    config=config.data,
    rate=geometry.rate,
    min_input=geometry.window(1),
    tokenizer=tokenizer.load(_TOKENS.value) if _TOKENS.value else None,
    decode=_DECODE.value,
  )
  source = sources.open_source(
    _SOURCE.value,
    split=_SPLIT.value,
    sample_rate=config.data.features.sample_rate,
    # The check measures by itself; a line that nobody understands is a finding
    # here, not an error.
    measure=False,
    tolerant=True,
  )
  if _OUT.value:
    # Before the long part, not after it.
    check.require_files(source)
  report = check.check(source, settings, num_workers=_WORKERS.value)
  print('\n'.join(check.describe(report)))
  if _OUT.value and report.good:
    check.write_cleaned(_OUT.value, source, report)
    print(f'wrote {_OUT.value}')
  print(json.dumps(report.to_json(), ensure_ascii=False))
  return command.OK if report.usable else command.FAILED


if __name__ == '__main__':
  command.run(main)
