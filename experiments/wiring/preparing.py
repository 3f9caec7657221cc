"""What a run is made of, checked and written down before it trains."""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

from data_pipelines import mixing
from data_pipelines import pipeline
from experiments.wiring import corpora
from experiments.wiring import starting
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import processes
from u2moe_jax.frontend import cmvn as cmvn_lib
from u2moe_jax.text import tokenizer as tokenizer_lib
from u2moe_jax.training import parameters
from u2moe_jax.training import skips as skips_lib

# Keys that may change when a run is continued.
_MAY_CHANGE = (
  'train.num_steps',
  'train.log_every',
  'train.save_every',
  'train.keep_last',
  'train.keep_every',
  'train.max_nonfinite',
  'train.idle_expert_steps',
  'data.test',
  'data.max_skipped',
  'data.num_workers',
  'data.worker_type',
  'decode',
  'mesh',
)


@dataclasses.dataclass(frozen=True)
class Resources:
  """What is derived from the data before training.

  Attributes:
    config: resolved: vocabulary and special ids filled in.
    tokenizer: text to ids.
    cmvn: statistics of the training features.
    train: training utterances.
    dev: dev utterances, or None.
    skips: what is left out of both.
    source: the model to start from; None to start afresh, or to continue.
  """

  config: config_lib.Config
  tokenizer: tokenizer_lib.Tokenizer
  cmvn: cmvn_lib.CmvnStats
  train: pipeline.Corpus
  dev: pipeline.Corpus | None
  skips: skips_lib.SkipLog
  source: starting.Source | None


def check_trainable(config: config_lib.Config) -> None:
  """Refuses what cannot learn.

  Raises:
    config_lib.ConfigError: for a top-1 router under `topk_softmax`, whose
      only weight is always 1, so that it gets no gradient.
  """
  for name in ('encoder', 'decoder'):
    moe = getattr(config.model, name).moe
    if moe.num_experts and moe.top_k == 1 and moe.router_type == 'topk_softmax':
      raise config_lib.ConfigError(
        f'model.{name}.moe: top_k=1 with router_type=topk_softmax gives the '
        'router no gradient (its weight is always 1); set '
        f'model.{name}.moe.router_type=softmax_topk or top_k=2'
      )
  if config.train.freeze_steps and not config.train.trainable:
    raise config_lib.ConfigError(
      f'train.freeze_steps={config.train.freeze_steps} needs train.trainable: '
      'which parameters train before'
    )
  if not config.data.train:
    raise config_lib.ConfigError(
      'data.train is empty; give a manifest or a prepared dataset folder'
    )


def prepare(
  config: config_lib.Config, workdir: pathlib.Path, *, strict: bool = False
) -> Resources:
  """Opens the data and derives token table, CMVN and resolved config.

  Everything is checked before the first file is written.

  Args:
    config: the experiment.
    workdir: where the run is, or will be.
    strict: let no utterance be left out.
  """
  check_trainable(config)
  mixture = corpora.open_data(config, config.data.train)
  tokens = workdir / 'tokens'
  # A run keeps its table, even if the transcripts have changed since.
  if tokens.is_dir():
    tokenizer = tokenizer_lib.load(tokens)
  else:
    tokenizer = corpora.first_tokenizer(config.data, mixture)
  config = resolve(config, tokenizer)
  train = corpora.make_corpus(config, mixture, tokenizer)
  dev = None
  if config.data.dev:
    opened = corpora.open_data(config, config.data.dev, split='dev')
    dev = corpora.make_corpus(config, opened, tokenizer)
  # Only now: what the data decides is part of the experiment.
  _require_same_run(config, workdir)
  if config.train.trainable:
    params = directory.abstract_variables(config.model)['params']
    parameters.require_known(config.train.trainable, params)
  source = None
  # `init_from` is where a run begins; one that continues has its own weights.
  # Not config.json tells: a run may have been stopped before its first step.
  if not directory.step_folders(workdir):
    source = starting.find_source(config, tokenizer)
  processes.wait('checked')  # from here on the folder changes
  _require_writable(workdir)
  skips = _note_skips(config, workdir, train, dev, strict=strict)
  cmvn = _cmvn(config, mixture, workdir)
  _record(config, tokenizer, workdir)
  return Resources(config, tokenizer, cmvn, train, dev, skips, source)


def resolve(
  config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer
) -> config_lib.Config:
  """Fills in what the data decides: vocabulary, special ids, mel bins."""
  special = tokenizer.special
  return dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model,
      vocab_size=tokenizer.vocab_size,
      feature_dim=config.data.features.num_mel_bins,
      blank_id=special.blank,
      sos_id=special.sos,
      eos_id=special.eos,
    ),
  )


def _require_writable(workdir: pathlib.Path) -> None:
  """Raises OSError, saying what to do, if nothing can be written there."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise OSError(
      f'{workdir}: nothing can be written there ({error.strerror}); make it '
      'writable, or choose another --workdir'
    ) from error


def _note_skips(
  config: config_lib.Config,
  workdir: pathlib.Path,
  train: pipeline.Corpus,
  dev: pipeline.Corpus | None,
  *,
  strict: bool,
) -> skips_lib.SkipLog:
  """Writes down what cannot be used, or stops because of it."""
  if processes.is_first() and not (workdir / 'config.json').is_file():
    # Of a run that never started; by now the data may have been corrected.
    (workdir / 'skipped.jsonl').unlink(missing_ok=True)
  # Every process reads the file below; the old one must be gone by then.
  processes.wait('old skips')
  corpora_by_split = {'train': train, 'dev': dev}
  total = sum(
    len(each.items) + len(each.skipped)
    for each in corpora_by_split.values()
    if each is not None
  )
  skips = skips_lib.SkipLog(
    workdir,
    num_utterances=total,
    max_share=config.data.max_skipped,
    strict=strict,
  )
  # What an earlier sitting noted counts as well.
  skips.check()
  for split, corpus in corpora_by_split.items():
    if corpus is not None:
      skips.add(corpus.skipped, split=split)
  return skips


def _cmvn(
  config: config_lib.Config, mixture: mixing.Mixture, workdir: pathlib.Path
) -> cmvn_lib.CmvnStats:
  """The run's statistics; computed once, for it takes a while."""
  file = workdir / 'global_cmvn.json'
  if processes.is_first() and not file.is_file():
    cmvn_lib.save(file, corpora.first_cmvn(config.data, mixture))
  processes.wait('cmvn')
  # From the file, by all: so every host has the same numbers.
  return cmvn_lib.load(file)


def _require_same_run(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Refuses to continue a run as another experiment."""
  file = workdir / 'config.json'
  if not file.is_file():
    return
  old = json.loads(file.read_text(encoding='utf-8'))
  # Keys that came later had their defaults then.
  old = config_lib.to_dict(config_lib.from_dict(config_lib.Config, old))
  changed = [
    key
    for key in differences(old, config_lib.to_dict(config))
    # `decode` and `mesh` stand for all of their keys.
    if not any(f'{key}.'.startswith(f'{name}.') for name in _MAY_CHANGE)
  ]
  if changed:
    raise config_lib.ConfigError(
      f'{workdir} holds a run with another {changed[0]!r}; continue with the '
      'same config or choose another --workdir'
    )


def _record(
  config: config_lib.Config,
  tokenizer: tokenizer_lib.Tokenizer,
  workdir: pathlib.Path,
) -> None:
  """Writes the token table, once, and config.json."""
  if not processes.is_first():
    return
  if not (workdir / 'tokens').is_dir():
    unfinished = workdir / 'tokens.unfinished'
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save(unfinished)
    unfinished.rename(workdir / 'tokens')
  # Last of all: where it is, the run counts as begun.
  write_json(workdir / 'config.json', config_lib.to_dict(config))


def write_json(file: pathlib.Path, tree: Any) -> None:
  temporary = file.with_suffix('.json.tmp')
  text = json.dumps(tree, indent=2)
  temporary.write_text(text + '\n', encoding='utf-8')
  os.replace(temporary, file)


def differences(old: Mapping, new: Mapping, prefix: str = '') -> list[str]:
  """Keys whose values differ, joined by dots."""
  keys = []
  for key in sorted(set(old) | set(new)):
    a, b = old.get(key), new.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      keys += differences(a, b, f'{prefix}{key}.')
    elif a != b:
      keys.append(prefix + key)
  return keys
