"""The batch shapes of a run, their programs, and warming them up."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import plan
from u2moe_jax import config as config_lib
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.training import memory
from u2moe_jax.training import programs as programs_lib
from u2moe_jax.training import state as state_lib
from u2moe_jax.training import step as step_lib

# Programs that compile at the same time, at most.
_MOST_THREADS = 4


def shape_of(bucket: plan.Bucket) -> programs_lib.Shape:
  """The batch shape of a bucket."""
  return programs_lib.Shape(
    bucket.max_frames, bucket.max_tokens, bucket.batch_size
  )


@dataclasses.dataclass(frozen=True)
class Machinery:
  """The programs of a run.

  Attributes:
    train: the train step by shape.
    evaluate: the evaluation step by shape; None without a dev set.
    planned: every shape that will occur, with its programs.
    target: the abstract training state.
  """

  train: programs_lib.Programs
  evaluate: programs_lib.Programs | None
  planned: Sequence[tuple[programs_lib.Programs, programs_lib.Shape]]
  target: state_lib.TrainState


def make_machinery(
  config: config_lib.Config,
  model: Any,
  optimizer: Any,
  target: state_lib.TrainState,
  *,
  mesh: jax.sharding.Mesh,
  train_shapes: Sequence[programs_lib.Shape],
  dev_shapes: Sequence[programs_lib.Shape],
) -> Machinery:
  """Makes the steps; compiles nothing.

  Args:
    config: the experiment, resolved.
    model: the recogniser.
    optimizer: see `optimizer.make_optimizer`.
    target: the abstract state, with shardings.
    mesh: the device mesh.
    train_shapes: of the training batches.
    dev_shapes: of the dev batches; empty for no dev set.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
  options = {
    'num_bins': config.model.feature_dim,
    'sharding': placement.batch_sharding(mesh, rules.STANDARD),
  }
  train = programs_lib.Programs(
    step_lib.make_train_step(
      model, optimizer, config, shardings=shardings, mesh=mesh
    ),
    (target,),
    name='train',
    **options,
  )
  evaluate = None
  if dev_shapes:
    evaluate = programs_lib.Programs(
      step_lib.make_eval_step(model, config, shardings=shardings, mesh=mesh),
      (target.params, target.buffers),
      name='dev',
      **options,
    )
  planned = [(train, shape) for shape in dict.fromkeys(train_shapes)]
  if evaluate is not None:
    planned += [(evaluate, shape) for shape in dict.fromkeys(dev_shapes)]
  return Machinery(train, evaluate, planned, target)


def warm_up(
  machinery: Machinery,
  *,
  should_stop: Callable[[], bool] = lambda: False,
  say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> bool:
  """Compiles every shape and runs the largest ones, before training.

  So memory runs out here or never. The steps run on a state of zeros and
  batches without utterances; nothing of a run depends on them.

  Args:
    machinery: the programs.
    should_stop: asked after each shape.
    say: told what happens.

  Returns:
    False if it was stopped.

  Raises:
    OutOfMemoryError: naming the bucket, and what to lower.
  """
  begun = time.monotonic()
  limit = memory.limit()
  shapes: dict[str, list[str]] = {}
  for programs, shape in machinery.planned:
    shapes.setdefault(programs.name, []).append(str(shape))
  listed = '; '.join(f'{k} {", ".join(v)}' for k, v in shapes.items())
  say(
    f'{len(machinery.planned)} shapes to compile (frames x tokens x '
    f'utterances): {listed}'
  )
  largest: dict[str, programs_lib.Program] = {}
  threads = min(_MOST_THREADS, os.cpu_count() or 1)
  compiled = programs_lib.compile_all(machinery.planned, num_threads=threads)
  for program in compiled:
    # What the compiler foretells is refused by name, before the device is
    # asked.
    memory.require_fit(program, limit)
    say(f'  {program.name} {program.shape}: {_figures(program)}')
    rival = largest.setdefault(program.name, program)
    if (program.memory_bytes or 0) > (rival.memory_bytes or 0):
      largest[program.name] = program
    if should_stop():
      # Closing the generator cancels the shapes that wait for a thread.
      compiled.close()
      return False
  seconds = _run(machinery, largest)
  worst = max(largest.values(), key=lambda program: program.memory_bytes or 0)
  known = f' of {limit / memory.GIB:.1f}' if limit else ''
  say(
    f'compiled in {time.monotonic() - begun - seconds:.1f} s; the largest, '
    f'{worst.name} {worst.shape}, needs '
    f'{(worst.memory_bytes or 0) / memory.GIB:.2f}{known} GiB; first runs took '
    f'{seconds:.1f} s'
  )
  return True


def _figures(program: programs_lib.Program) -> str:
  needed = program.memory_bytes
  size = '' if needed is None else f', {needed / memory.GIB:.2f} GiB'
  return f'{program.seconds:.1f} s{size}, {program.num_flops / 1e9:.2f} GFLOP'


def _run(
  machinery: Machinery, largest: Mapping[str, programs_lib.Program]
) -> float:
  """Runs one program of each kind; returns the seconds."""
  target = machinery.target
  # Born with its shardings: as a whole it may not fit any one device.
  make = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target),
    out_shardings=jax.tree.map(lambda x: x.sharding, target),
  )
  state = make()
  begun = time.monotonic()
  # Before the train step, which is donated the state and leaves nothing of it.
  if machinery.evaluate is not None and 'dev' in largest:
    shape = largest['dev'].shape
    batch = machinery.evaluate.empty_batch(shape)
    _try(machinery.evaluate, shape, state.params, state.buffers, batch)
  shape = largest['train'].shape
  _try(machinery.train, shape, state, machinery.train.empty_batch(shape))
  return time.monotonic() - begun


def _try(
  programs: programs_lib.Programs, shape: programs_lib.Shape, *arguments: Any
) -> None:
  try:
    # Calls return before they have run; only waiting brings the error here.
    jax.block_until_ready(programs(*arguments))
  except jax.errors.JaxRuntimeError as error:
    raise memory.explain(error, programs.name, shape) from error


def shapes_of(
  arrays: Sequence[Mapping[str, np.ndarray]],
) -> list[programs_lib.Shape]:
  """The different shapes of batches, of which each host has its rows."""
  shapes = dict.fromkeys(
    programs_lib.Shape.of(each['features'], each['labels']) for each in arrays
  )
  # Rows are told of all hosts, since a program is compiled for all of them.
  hosts = jax.process_count()
  return [dataclasses.replace(each, rows=hosts * each.rows) for each in shapes]
