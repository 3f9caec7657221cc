"""From a config to a trained model directory."""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

from absl import logging
import jax
import numpy as np

from data_pipelines import pipeline
from data_pipelines import plan
from experiments.wiring import buckets as buckets_lib
from experiments.wiring import preparing
from experiments.wiring import starting
from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import average
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import processes
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
from u2moe_jax.training import programs as programs_lib
from u2moe_jax.training import skips as skips_lib
from u2moe_jax.training import state as state_lib
from u2moe_jax.training import stopping


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
    `model/` holds the average of the best checkpoints so far, if there are any.
  """
  workdir = pathlib.Path(workdir).absolute()
  # First: a mesh that does not fit the devices must not cost reading the data.
  mesh = mesh_lib.make_mesh(config.mesh)
  resources = preparing.prepare(config, workdir, strict=strict)
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
      processes.say(
        f'{workdir}: training is done ({steps} steps); nothing to do'
      )
      return True
    if processes.is_first():
      _announce(resources, mesh)
    trainer = make_trainer(resources, workdir, mesh, store, stop, options)
    if trainer is None:
      processes.say(f'stopped by {stop.name} before the first step')
      return False
    done = trainer.run(stop)
    if store.latest_step() is not None:  # not stopped before the first step
      write_model(resources, workdir, store, trainer.state)
  if not done:
    step = int(trainer.state.step)
    processes.say(
      f'stopped by {stop.name} at step {step}; the same command continues'
    )
  return done


def _is_done(
  resources: preparing.Resources, workdir: pathlib.Path, store: store_lib.Store
) -> bool:
  step = store.latest_step()
  if step is None or step < resources.config.train.num_steps:
    return False
  # A signal during the last evaluation left that to this run.
  measured = resources.dev is None or store.wer(step) is not None
  return measured and (workdir / 'model').is_dir()


def make_trainer(
  resources: preparing.Resources,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  store: store_lib.Store,
  stop: stopping.StopRequest,
  options: loop.Options | None = None,
) -> loop.Trainer | None:
  """Compiles everything, then places the state; None if asked to stop."""
  config = resources.config
  model = u2.U2MoeModel(config.model)
  optimizer = optimizer_lib.optimizer_of(config)
  buffers = make_buffers(config.model, resources.cmvn)
  target = state_lib.abstract_state_on(mesh, model, optimizer, buffers)
  sharding = placement.batch_sharding(mesh, rules.STANDARD)

  def place(arrays: Mapping[str, np.ndarray]):
    # Of the arrays a process has its rows; placed, they are the whole batch.
    return objective.Batch(**placement.shard_batch(dict(arrays), sharding))

  batches = _make_batches(resources, workdir, mesh, store)
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
  if not buckets_lib.warm_up(
    machinery, should_stop=stop.asked, say=processes.say
  ):
    return None
  state, counters = _first_state(
    resources, model, optimizer, buffers, target, store
  )
  # None where no maker states one, as of CPUs; then no MFU is logged.
  peak = flops.peak(jax.devices()[0].device_kind)
  return loop.Trainer(
    config=config,
    workdir=workdir,
    state=state,
    train_step=machinery.train,
    place=place,
    # `start`, the number of a batch, is all that a checkpoint keeps of the
    # data.
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
    # Of the program that runs: shapes differ in their work.
    num_flops=lambda shape: machinery.train.program(shape).num_flops,
    peak_flops=peak * jax.device_count() if peak else None,
  )


def _make_batches(
  resources: preparing.Resources,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  store: store_lib.Store,
) -> pipeline.TrainBatches:
  """The batches of the run: on any mesh those that it began with."""
  file = workdir / 'buckets.json'
  known = None
  # Without a checkpoint nothing hangs on old buckets yet, and they are made
  # anew.
  if store.latest_step() is not None and file.is_file():
    tree = json.loads(file.read_text(encoding='utf-8'))
    known = [plan.Bucket(**each) for each in tree]
  parts = placement.batch_parts(mesh, rules.STANDARD)
  batches = pipeline.TrainBatches(
    resources.train,
    seed=resources.config.train.seed,
    multiple=parts,
    buckets=known,
    **_this_host(),
  )
  if known is None and processes.is_first():
    # Those of the plan: the rows that a mesh adds are none of the run.
    tree = [dataclasses.asdict(each) for each in batches.planned_buckets]
    preparing.write_json(file, tree)
  if known not in (None, batches.buckets):
    processes.say(
      f'{parts} devices share each batch, which had other sizes so far: they '
      'stay, with empty rows behind them'
    )
  return batches


def _this_host() -> dict[str, int]:
  return {
    'host_index': jax.process_index(),
    'num_hosts': jax.process_count(),
  }


def _dev_batches(
  resources: preparing.Resources, batches: pipeline.TrainBatches
):
  """Arrays and transcripts of every dev batch; kept, they are few.

  With several hosts the arrays are this host's rows, the transcripts all.
  """
  if resources.dev is None:
    return []
  # Every other shape, the largest among them: half the programs to compile, and
  # more padding where it costs little.
  shapes = batches.buckets[::-2][::-1]
  dev = []
  skipped: list[pipeline.Skip] = []
  for host, indices in pipeline.evaluation_batches(
    resources.dev, buckets=shapes, **_this_host()
  ):
    skipped += host.skipped
    dev.append((host.arrays, [resources.dev.text(i) for i in indices]))
  # Each host has opened only its rows, and each must know of all.
  unusable = skips_lib.shared(skipped)
  resources.skips.add(unusable, split='dev')
  if len(unusable) == sum(len(texts) for _, texts in dev):
    # Its error rate would be 0, which is better than any.
    raise pipeline.NoDataError(
      f'no utterance of {resources.config.data.dev} can be read; '
      'skipped.jsonl in the work directory tells of each why'
    )
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
  resources: preparing.Resources,
  model: u2.U2MoeModel,
  optimizer: Any,
  buffers: PyTree,
  target: state_lib.TrainState,
  store: store_lib.Store,
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
    processes.say(resources.source.describe())
    # Under jit moments are born with their shardings.
    init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    state = resources.source.apply(state, init)
  return state, loop.Counters()


def _make_evaluate(
  resources: preparing.Resources,
  eval_step: programs_lib.Programs | None,
  dev: Sequence[tuple[Mapping[str, np.ndarray], list[str]]],
  place: Callable[[Mapping[str, np.ndarray]], objective.Batch],
):
  if eval_step is None:
    return None

  def run(params: PyTree, buffers: PyTree, should_stop: Callable[[], bool]):
    return evaluate.evaluate(
      eval_step,
      params,
      buffers,
      # Placed one by one: the devices hold a single dev batch.
      ((place(arrays), texts) for arrays, texts in dev),
      to_text=resources.tokenizer.decode,
      blank_id=resources.config.model.blank_id,
      should_stop=should_stop,
    )

  return run


def _announce(resources: preparing.Resources, mesh: jax.sharding.Mesh) -> None:
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
    if not steps:
      print('the others stay as they are')
    elif steps < config.train.num_steps:
      print(f'the others train from step {steps + 1} on')
    else:
      print(
        'the others stay as they are: training ends with step '
        f'{config.train.num_steps}, train.freeze_steps is {steps}'
      )
  for corpus in (resources.train, resources.dev):
    if corpus is not None:
      _tell_problems(corpus, resources.tokenizer)


def _tell_problems(
  corpus: pipeline.Corpus, tokenizer: tokenizer_lib.Tokenizer
) -> None:
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


def write_model(
  resources: preparing.Resources,
  workdir: pathlib.Path,
  store: store_lib.Store,
  state: state_lib.TrainState,
) -> None:
  """Averages the best checkpoints into WORKDIR/model."""
  config = resources.config
  # Saving goes on in the background.
  store.wait()
  steps = store.best_steps(config.train.average_best)
  target = store_lib.as_abstract(
    {'params': state.params, 'buffers': state.buffers}
  )
  # `_readable` fills `steps` while `average` draws from it, so they are known
  # only behind that line.
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
  processes.say(f'wrote {workdir / "model"} (average of steps {steps})')


def _readable(
  store: store_lib.Store,
  candidates: list[int],
  target: PyTree,
  steps: list[int],
) -> Iterator[PyTree]:
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
