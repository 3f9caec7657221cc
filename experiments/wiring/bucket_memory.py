"""How large the batches of each bucket may be, from compiled programs."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any

import jax

from data_pipelines import pipeline
from data_pipelines import plan
from experiments.wiring import buckets as buckets_lib
from experiments.wiring import corpora
from experiments.wiring import preparing
from u2moe_jax import config as config_lib
from u2moe_jax.models import u2
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.training import errors
from u2moe_jax.training import memory
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import programs as programs_lib
from u2moe_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Size:
  """What fits one bucket.

  Attributes:
    bucket: as the config makes it.
    bytes_before: of its train step, at that size.
    rows: the batch size that fits.
    bytes: of the train step at that size.
  """

  bucket: plan.Bucket
  bytes_before: int
  rows: int
  bytes: int


def profile(config: config_lib.Config, limit: int) -> Iterator[Size]:
  """Finds the batch size of each bucket, the longest first.

  Args:
    config: the experiment; its `data.batch_sizes` are not looked at.
    limit: bytes that a train step may take of one device.

  Yields:
    One size for each bucket by frames.

  Raises:
    errors.OutOfMemoryError: if even the smallest batch does not fit.
  """
  # They are what is sought; and of another number they would be refused.
  config = config_lib.replace(config, 'data.batch_sizes', ())
  preparing.check_trainable(config)
  mesh = mesh_lib.make_mesh(config.mesh)
  multiple = placement.batch_parts(mesh, rules.STANDARD)
  mixture = corpora.open_data(config, config.data.train)
  tokenizer = corpora.first_tokenizer(config.data, mixture)
  config = preparing.resolve(config, tokenizer)
  corpus = corpora.make_corpus(config, mixture, tokenizer)
  batches = pipeline.TrainBatches(
    corpus, seed=config.train.seed, multiple=multiple
  )
  with jax.set_mesh(mesh):
    measure = _make_measure(config, mesh)
    for bucket in _longest_first(batches.buckets):
      yield fit(
        bucket,
        measure,
        limit=limit,
        multiple=multiple,
        most=config.data.max_batch_size,
      )


def _longest_first(buckets: Sequence[plan.Bucket]) -> list[plan.Bucket]:
  """Of the buckets of the same frames the one with most tokens."""
  # `data.batch_sizes` has one size for all buckets of the same frames, so the
  # widest decides.
  groups = itertools.groupby(buckets, key=lambda bucket: bucket.max_frames)
  widest = [max(group, key=lambda b: b.max_tokens) for _, group in groups]
  return widest[::-1]


def _make_measure(
  config: config_lib.Config, mesh: jax.sharding.Mesh
) -> Callable[[programs_lib.Shape], int]:
  """A function from a shape to the bytes of its train step."""
  model = u2.U2MoeModel(config.model)
  optimizer: Any = optimizer_lib.optimizer_of(config)
  buffers = u2.init_buffers(config.model)
  target = state_lib.abstract_state_on(mesh, model, optimizer, buffers)
  machinery = buckets_lib.make_machinery(
    config,
    model,
    optimizer,
    target,
    mesh=mesh,
    train_shapes=(),
    dev_shapes=(),
  )

  def measure(shape: programs_lib.Shape):
    needed = machinery.train.lower(shape)().memory_bytes
    if needed is None:
      raise errors.OutOfMemoryError(
        'the compiler of this device does not tell what a program needs'
      )
    return needed

  return measure


def fit(
  bucket: plan.Bucket,
  measure: Callable[[programs_lib.Shape], int],
  *,
  limit: int,
  multiple: int,
  most: int,
) -> Size:
  """Finds the largest batch of a bucket that fits.

  The memory of a step is close to a + b * rows, so two measurements foretell
  the size, which is measured in its turn.

  Args:
    bucket: frames, tokens, and the size to start from.
    measure: a batch shape to bytes.
    limit: bytes that there are.
    multiple: sizes are multiples of it.
    most: largest size.

  Raises:
    errors.OutOfMemoryError: if not even `multiple` rows fit.
  """
  shape = buckets_lib.shape_of(bucket)
  # A measurement is a compilation, so none is made twice.
  known: dict[int, int] = {}

  def needed(rows: int) -> int:
    if rows not in known:
      known[rows] = measure(dataclasses.replace(shape, rows=rows))
    return known[rows]

  def rounded(rows: float) -> int:
    return max(1, int(min(rows, most)) // multiple) * multiple

  rows = shape.rows
  # Two points of the line: its double, or its half where `most` forbids that.
  other = rounded(2 * rows) if rounded(2 * rows) > rows else rounded(rows / 2)
  # Neither is another size. One step beyond is measured and never returned.
  if other == rows:
    other = rows + multiple
  slope = (needed(other) - needed(rows)) / (other - rows)
  fixed = needed(rows) - slope * rows
  # Memory may not grow at all between two sizes; then only `most` counts.
  found = rounded((limit - fixed) / slope if slope > 0 else most)
  while needed(found) > limit:
    if found <= multiple:
      raise errors.OutOfMemoryError(
        f'{found} utterances {memory.describe(shape)} need '
        f'{needed(found) / memory.GIB:.2f} GiB, more than the '
        f'{limit / memory.GIB:.2f} GiB there are; lower data.max_seconds, or '
        'set model.encoder.remat'
      )
    # The line promised too much. At least one step down, so that this ends.
    found = rounded(min(found - multiple, 0.97 * found))
  return Size(bucket, needed(rows), found, needed(found))
