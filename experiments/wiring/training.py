"""From a config to a trained model directory."""

import collections
from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import shutil

from absl import logging
import jax
import numpy as np

from data_pipelines import pipeline
from data_pipelines import sources
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import average
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.frontend import cmvn as cmvn_lib
from u2moe_jax.frontend import fbank
from u2moe_jax.layers import subsampling
from u2moe_jax.models import u2
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.text import tokenizer as tokenizer_lib
from u2moe_jax.training import evaluate
from u2moe_jax.training import loop
from u2moe_jax.training import objective
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import state as state_lib
from u2moe_jax.training import step as step_lib

# Keys that may change when a run is continued.
_MAY_CHANGE = (
  'train.num_steps',
  'train.log_every',
  'train.save_every',
  'train.keep_last',
  'data.num_workers',
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
  """

  config: config_lib.Config
  tokenizer: tokenizer_lib.Tokenizer
  cmvn: cmvn_lib.CmvnStats
  train: pipeline.Corpus
  dev: pipeline.Corpus | None


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
  if not config.data.train:
    raise config_lib.ConfigError(
      'data.train is empty; give a manifest or a prepared dataset folder'
    )


def prepare(config: config_lib.Config, workdir: pathlib.Path) -> Resources:
  """Opens the data and derives token table, CMVN and resolved config.

  Everything is checked before the first file is written.
  """
  check_trainable(config)
  source = sources.open_source(config.data.train)
  tokens = workdir / 'tokens'
  if tokens.is_dir():
    tokenizer = tokenizer_lib.load(tokens)
  else:
    tokenizer = _first_tokenizer(config.data, source)
  special = tokenizer.special
  config = dataclasses.replace(
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
  make = _corpus_maker(config, tokenizer)
  train = make(source)
  dev = None
  if config.data.dev:
    dev = make(sources.open_source(config.data.dev, split='dev'))
  _require_same_run(config, workdir)
  cmvn = _cmvn(config, source, workdir)
  _record(config, tokenizer, workdir)
  return Resources(config, tokenizer, cmvn, train, dev)


def _corpus_maker(config, tokenizer):
  geometry = subsampling.geometry(config.model.encoder.subsampling)

  def make(source):
    return pipeline.Corpus(
      source,
      tokenizer,
      config.data,
      rate=geometry.rate,
      min_input=geometry.window(1),
    )

  return make


def _first_tokenizer(data, source) -> tokenizer_lib.Tokenizer:
  """The configured table, the corpus's own, or one from the transcripts."""
  texts = [utterance.txt for utterance in source.utterances]
  beside = pathlib.Path(data.train) / 'tokens'
  if data.tokens:
    return tokenizer_lib.load(data.tokens)
  if data.token_type == 'bytes':
    return tokenizer_lib.ByteTokenizer()
  if data.token_type == 'bpe':
    return tokenizer_lib.train_bpe(texts, data.num_tokens, model_type='bpe')
  if beside.is_dir():
    return tokenizer_lib.load(beside)
  return tokenizer_lib.build_char_tokenizer(texts)


def _cmvn(config, source, workdir) -> cmvn_lib.CmvnStats:
  """The run's statistics; computed once, for it takes a while."""
  file = workdir / 'global_cmvn.json'
  if file.is_file():
    return cmvn_lib.load(file)
  stats = _first_cmvn(config, source)
  workdir.mkdir(parents=True, exist_ok=True)
  cmvn_lib.save(file, stats)
  return stats


def _first_cmvn(config, source) -> cmvn_lib.CmvnStats:
  bins = config.data.features.num_mel_bins
  if config.data.cmvn:
    stats = cmvn_lib.load(config.data.cmvn)
    if len(stats.sum) != bins:
      raise config_lib.ConfigError(
        f'{config.data.cmvn} has {len(stats.sum)} bins, '
        f'data.features.num_mel_bins asks for {bins}'
      )
    return stats
  beside = pathlib.Path(config.data.train) / 'global_cmvn.json'
  if beside.is_file():
    stats = cmvn_lib.load(beside)
    if len(stats.sum) == bins:
      return stats
  print(f'computing CMVN of {bins} mel bins', flush=True)
  return compute_cmvn(source, config.data.features)


def compute_cmvn(
  source: sources.Source, features: config_lib.FeatureConfig
) -> cmvn_lib.CmvnStats:
  """Statistics of raw features, no dither, over at most 5,000 utterances."""
  stats = cmvn_lib.empty(features.num_mel_bins)
  step = max(1, len(source) // 5000)
  for index in range(0, len(source), step):
    try:
      samples = source.load(index)
    except ValueError:  # reported again, with its reason, when training
      continue
    stats = cmvn_lib.accumulate(stats, fbank.fbank(samples, features))
  return stats


def _require_same_run(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Refuses to continue a run as another experiment."""
  file = workdir / 'config.json'
  if not file.is_file():
    return
  old = json.loads(file.read_text(encoding='utf-8'))
  changed = [
    key
    for key in _differences(old, config_lib.to_dict(config))
    if not key.startswith(_MAY_CHANGE)
  ]
  if changed:
    raise config_lib.ConfigError(
      f'{workdir} holds a run with another {changed[0]!r}; continue with the '
      'same config or choose another --workdir'
    )


def _record(config, tokenizer, workdir: pathlib.Path) -> None:
  """Writes the token table, once, and config.json."""
  workdir.mkdir(parents=True, exist_ok=True)
  if not (workdir / 'tokens').is_dir():
    unfinished = workdir / 'tokens.unfinished'
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save(unfinished)
    unfinished.rename(workdir / 'tokens')
  file = workdir / 'config.json'
  temporary = file.with_suffix('.json.tmp')
  text = json.dumps(config_lib.to_dict(config), indent=2)
  temporary.write_text(text + '\n', encoding='utf-8')
  os.replace(temporary, file)


def _differences(old: Mapping, new: Mapping, prefix: str = '') -> list[str]:
  keys = []
  for key in sorted(set(old) | set(new)):
    a, b = old.get(key), new.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      keys += _differences(a, b, f'{prefix}{key}.')
    elif a != b:
      keys.append(prefix + key)
  return keys


def train(config: config_lib.Config, workdir: str | os.PathLike[str]) -> bool:
  """Trains, or continues, or says that it is done.

  Args:
    config: the experiment.
    workdir: where everything goes.

  Returns:
    True when training is done, False when a signal stopped it. Either way
    `model/` holds the average of the best checkpoints so far.
  """
  workdir = pathlib.Path(workdir).absolute()
  mesh = mesh_lib.make_mesh(config.mesh)
  resources = prepare(config, workdir)
  config = resources.config
  store = store_lib.Store(
    workdir,
    keep_last=config.train.keep_last,
    keep_best=config.train.average_best,
  )
  with jax.set_mesh(mesh):
    trainer = make_trainer(resources, workdir, mesh, store)
    step = int(trainer.state.step)
    if step >= config.train.num_steps and (workdir / 'model').is_dir():
      print(f'{workdir}: training is done ({step} steps); nothing to do')
      store.close()
      return True
    _announce(resources, mesh)
    done = trainer.run()
    write_model(resources, workdir, store, trainer.state)
  store.close()
  return done


def make_trainer(resources, workdir, mesh, store) -> loop.Trainer:
  """Places the state (fresh, or restored) and compiles nothing yet."""
  config = resources.config
  model = u2.U2MoeModel(config.model)
  optimizer = optimizer_lib.make_optimizer(
    config.optimizer, num_steps=config.train.num_steps
  )
  buffers = make_buffers(config.model, resources.cmvn)
  shardings = state_lib.state_shardings(model, optimizer, buffers, mesh=mesh)
  state = _first_state(config, model, optimizer, buffers, shardings, store)
  sharding = placement.batch_sharding(mesh, rules.STANDARD)

  def place(arrays):
    return objective.Batch(**placement.shard_batch(dict(arrays), sharding))

  parts = placement.batch_parts(mesh, rules.STANDARD)
  batches = pipeline.TrainBatches(
    resources.train, seed=config.train.seed, multiple=parts
  )
  return loop.Trainer(
    config=config,
    workdir=workdir,
    state=state,
    train_step=step_lib.make_train_step(
      model, optimizer, config, shardings=shardings, mesh=mesh
    ),
    place=place,
    batches=lambda start: batches.iterate(
      start, num_workers=config.data.num_workers
    ),
    evaluate=_make_evaluate(resources, model, shardings, mesh, batches, place),
    store=store,
  )


def make_buffers(config: config_lib.ModelConfig, cmvn: cmvn_lib.CmvnStats):
  """Fresh buffers with the corpus's CMVN."""
  buffers = u2.init_buffers(config)
  buffers['cmvn'] = {
    'mean': np.asarray(cmvn.mean, np.float32),
    'istd': np.asarray(cmvn.istd, np.float32),
  }
  return buffers


def _first_state(config, model, optimizer, buffers, shardings, store):
  step = store.latest_step()
  if step is None:
    key = jax.random.key(config.train.seed)
    state = state_lib.init_state(
      model, optimizer, buffers, key, shardings=shardings
    )
    if config.train.init_from:
      state = _start_from(config, state)
    return state
  target = state_lib.abstract_state(
    model, optimizer, buffers, shardings=shardings
  )
  variables, opt_state, progress = store.restore(
    step,
    params=target.params,
    buffers=target.buffers,
    opt_state=target.opt_state,
  )
  print(f'continuing at step {progress["step"]}')
  count = jax.device_put(np.int32(progress['step']), shardings.step)
  return state_lib.TrainState(
    step=count,
    params=variables['params'],
    opt_state=opt_state,
    buffers=variables['buffers'],
  )


def _start_from(config, state):
  found = directory.find(config.train.init_from)
  print(f'starting from {found.choice}')
  target = store_lib.as_abstract(
    {'params': state.params, 'buffers': state.buffers}
  )
  params, buffers = directory.restore(found, target)
  return state.replace(params=params, buffers=buffers)


def _make_evaluate(resources, model, shardings, mesh, batches, place):
  if resources.dev is None:
    return None
  config = resources.config
  eval_step = step_lib.make_eval_step(
    model, config, shardings=shardings, mesh=mesh
  )
  dev = [
    (host.arrays, [resources.dev.text(i) for i in indices])
    for host, indices in pipeline.evaluation_batches(
      resources.dev, buckets=batches.buckets
    )
  ]

  def run(params, buffers):
    return evaluate.evaluate(
      eval_step,
      params,
      buffers,
      ((place(arrays), texts) for arrays, texts in dev),
      to_text=resources.tokenizer.decode,
      blank_id=config.model.blank_id,
    )

  return run


def _announce(resources, mesh) -> None:
  config = resources.config
  total, active = u2.count_params(config.model)
  shapes = dict(mesh.shape)
  print(
    f'{total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active per frame | '
    f'{len(resources.train.items)} utterances, {resources.train.hours:.2f} h | '
    f'{config.model.vocab_size} tokens | mesh {shapes} | '
    f'{config.train.num_steps} steps'
  )
  for corpus in (resources.train, resources.dev):
    if corpus is not None:
      _tell_problems(corpus, resources.tokenizer)


def _tell_problems(corpus, tokenizer) -> None:
  """Says what is left out, and which characters the table has not."""
  if corpus.skipped:
    reasons = dict(collections.Counter(s.reason for s in corpus.skipped))
    first = corpus.skipped[0]
    logging.warning(
      '%d utterances left out: %s; the first is %s %s',
      len(corpus.skipped),
      reasons,
      first.key,
      first.detail,
    )
  unknown: dict[str, str] = {}
  for utterance in corpus.source.utterances:
    for character in tokenizer.unknown_characters(utterance.txt):
      unknown.setdefault(character, utterance.key)
  if unknown:
    character, key = next(iter(unknown.items()))
    logging.warning(
      '%d characters are not in the token table and become <unk>: %s; the '
      'first, %r, stands in %s',
      len(unknown),
      ' '.join(sorted(unknown)[:20]),
      character,
      key,
    )


def write_model(resources, workdir, store, state) -> None:
  """Averages the best checkpoints into WORKDIR/model."""
  config = resources.config
  store.wait()
  steps = store.best_steps(config.train.average_best)
  target = store_lib.as_abstract(
    {'params': state.params, 'buffers': state.buffers}
  )
  averaged = average.average(
    store.restore_params(step, target) for step in steps
  )
  directory.write(
    workdir / 'model',
    directory.Description(
      model=config.model,
      features=config.data.features,
      provenance=directory.provenance(
        averaged_steps=steps, seed=config.train.seed
      ),
    ),
    averaged['params'],
    averaged['buffers'],
    tokens=workdir / 'tokens',
  )
  print(f'wrote {workdir / "model"} (average of steps {steps})')
