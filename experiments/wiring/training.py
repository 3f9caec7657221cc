"""From a config to a trained model directory."""

import collections
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile

from absl import logging
import jax
import numpy as np

from data_pipelines import mixing
from data_pipelines import pipeline
from experiments.wiring import buckets as buckets_lib
from experiments.wiring import corpora
from experiments.wiring import starting
from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import average
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.frontend import cmvn as cmvn_lib
from u2moe_jax.models import u2
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.text import tokenizer as tokenizer_lib
from u2moe_jax.training import evaluate
from u2moe_jax.training import flops
from u2moe_jax.training import loop
from u2moe_jax.training import objective
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import parameters
from u2moe_jax.training import skips as skips_lib
from u2moe_jax.training import state as state_lib
from u2moe_jax.training import stopping

# Keys that may change when a run is continued.
_MAY_CHANGE = (
  'train.num_steps',
  'train.log_every',
  'train.save_every',
  'train.keep_last',
  'train.keep_every',
  'train.max_nonfinite',
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
  _require_same_run(config, workdir)
  if config.train.trainable:
    params = directory.abstract_variables(config.model)['params']
    parameters.require_known(config.train.trainable, params)
  source = None
  if not (workdir / 'config.json').is_file():
    source = starting.find_source(config, tokenizer)
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


def _note_skips(config, workdir, train, dev, *, strict) -> skips_lib.SkipLog:
  """Writes down what cannot be used, or stops because of it."""
  if not (workdir / 'config.json').is_file():
    # Of a run that never started; by now the data may have been corrected.
    (workdir / 'skipped.jsonl').unlink(missing_ok=True)
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
  if file.is_file():
    return cmvn_lib.load(file)
  stats = corpora.first_cmvn(config.data, mixture)
  workdir.mkdir(parents=True, exist_ok=True)
  cmvn_lib.save(file, stats)
  return stats


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


def train(
  config: config_lib.Config,
  workdir: str | os.PathLike[str],
  *,
  strict: bool = False,
  options: loop.Options | None = None,
) -> bool:
  """Trains, or continues, or says that it is done.

  Args:
    config: the experiment.
    workdir: where everything goes.
    strict: stop at the first utterance that cannot be used.
    options: of this call.

  Returns:
    True when training is done, False when a signal stopped it. Either way
    `model/` holds the average of the best checkpoints so far.
  """
  workdir = pathlib.Path(workdir).absolute()
  mesh = mesh_lib.make_mesh(config.mesh)
  resources = prepare(config, workdir, strict=strict)
  config = resources.config
  store = store_lib.Store(
    workdir,
    keep_last=config.train.keep_last,
    keep_best=config.train.average_best,
    keep_every=config.train.keep_every,
  )
  with (
    contextlib.closing(store),
    stopping.StopRequest() as stop,
    jax.set_mesh(mesh),
  ):
    if _is_done(resources, workdir, store):
      steps = store.latest_step()
      print(f'{workdir}: training is done ({steps} steps); nothing to do')
      return True
    _announce(resources, mesh)
    trainer = make_trainer(resources, workdir, mesh, store, stop, options)
    if trainer is None:
      return False
    done = trainer.run(stop)
    write_model(resources, workdir, store, trainer.state)
  return done


def _is_done(resources, workdir: pathlib.Path, store: store_lib.Store) -> bool:
  step = store.latest_step()
  if step is None or step < resources.config.train.num_steps:
    return False
  # A signal during the last evaluation left that to this run.
  measured = resources.dev is None or store.wer(step) is not None
  return measured and (workdir / 'model').is_dir()


def make_trainer(
  resources: Resources,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  store: store_lib.Store,
  stop: stopping.StopRequest,
  options: loop.Options | None = None,
) -> loop.Trainer | None:
  """Compiles everything, then places the state; None if asked to stop."""
  config = resources.config
  model = u2.U2MoeModel(config.model)
  optimizer = optimizer_lib.make_optimizer(
    config.optimizer,
    num_steps=config.train.num_steps,
    trainable=config.train.trainable,
    freeze_steps=config.train.freeze_steps,
  )
  buffers = make_buffers(config.model, resources.cmvn)
  target = state_lib.abstract_state_on(mesh, model, optimizer, buffers)
  sharding = placement.batch_sharding(mesh, rules.STANDARD)

  def place(arrays):
    return objective.Batch(**placement.shard_batch(dict(arrays), sharding))

  batches = _make_batches(resources, mesh)
  dev = _dev_batches(resources, batches)
  machinery = buckets_lib.make_machinery(
    config,
    model,
    optimizer,
    target,
    mesh=mesh,
    train_shapes=[buckets_lib.shape_of(each) for each in batches.buckets],
    dev_shapes=buckets_lib.shapes_of([arrays for arrays, _ in dev]),
  )
  if not buckets_lib.warm_up(machinery, should_stop=stop.asked):
    return None
  state, counters = _first_state(
    resources, model, optimizer, buffers, target, store
  )
  peak = flops.peak(jax.devices()[0].device_kind)
  return loop.Trainer(
    config=config,
    workdir=workdir,
    state=state,
    train_step=machinery.train,
    place=place,
    batches=lambda start: batches.iterate(
      start,
      num_workers=config.data.num_workers,
      worker_type=config.data.worker_type,
    ),
    evaluate=_make_evaluate(resources, machinery.evaluate, dev, place),
    store=store,
    skips=resources.skips,
    counters=counters,
    options=options or loop.Options(),
    num_flops=lambda shape: machinery.train.program(shape).num_flops,
    peak_flops=peak * jax.device_count() if peak else None,
  )


def _make_batches(
  resources: Resources, mesh: jax.sharding.Mesh
) -> pipeline.TrainBatches:
  parts = placement.batch_parts(mesh, rules.STANDARD)
  return pipeline.TrainBatches(
    resources.train,
    seed=resources.config.train.seed,
    multiple=parts,
    host_index=jax.process_index(),
    num_hosts=jax.process_count(),
  )


def _dev_batches(resources, batches):
  """Arrays and transcripts of every dev batch; kept, they are few."""
  if resources.dev is None:
    return []
  dev = []
  for host, indices in pipeline.evaluation_batches(
    resources.dev, buckets=batches.buckets
  ):
    resources.skips.add(host.skipped, split='dev')
    dev.append((host.arrays, [resources.dev.text(i) for i in indices]))
  return dev


def make_buffers(config: config_lib.ModelConfig, cmvn: cmvn_lib.CmvnStats):
  """Fresh buffers with the corpus's CMVN."""
  buffers = u2.init_buffers(config)
  buffers['cmvn'] = {
    'mean': np.asarray(cmvn.mean, np.float32),
    'istd': np.asarray(cmvn.istd, np.float32),
  }
  return buffers


def _first_state(
  resources, model, optimizer, buffers, target, store
) -> tuple[state_lib.TrainState, loop.Counters]:
  restored = starting.restore(store, target)
  if restored is not None:
    return restored
  shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
  key = jax.random.key(resources.config.train.seed)
  state = state_lib.init_state(
    model, optimizer, buffers, key, shardings=shardings
  )
  if resources.source is not None:
    print(resources.source.describe(), flush=True)
    init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    state = resources.source.apply(state, init)
  return state, loop.Counters()


def _make_evaluate(resources, eval_step, dev, place):
  if eval_step is None:
    return None

  def run(params, buffers, should_stop):
    return evaluate.evaluate(
      eval_step,
      params,
      buffers,
      ((place(arrays), texts) for arrays, texts in dev),
      to_text=resources.tokenizer.decode,
      blank_id=resources.config.model.blank_id,
      should_stop=should_stop,
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
  if config.train.trainable:
    params = directory.abstract_variables(config.model)['params']
    print(parameters.table(config.train.trainable, params))
    steps = config.train.freeze_steps
    print(
      f'the others train from step {steps + 1} on'
      if steps
      else 'the others stay as they are'
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
  steps, candidates = [], steps
  averaged = average.average(_readable(store, candidates, target, steps))
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


def _readable(store, candidates, target, steps) -> Iterator[PyTree]:
  """Yields the parameters that can be read, and notes in `steps` whose."""
  for step in candidates:
    try:
      tree = store.restore_params(step, target)
    except Exception as error:  # Orbax raises many kinds for damaged files
      logging.warning(
        'step %d is left out of the average: it cannot be read (%s)',
        step,
        contents.first_line(error),
      )
      continue
    steps.append(step)
    yield tree
