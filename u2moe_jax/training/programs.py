"""Compiled programs by batch shape: known, announced, compiled ahead.

A jitted function compiles when it meets a new shape, which takes from seconds
to minutes in the middle of a run. The shapes of a run are its buckets, so all
of them are compiled before the first step, and the step calls just those
programs.
"""

from collections.abc import Generator
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import time
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import PyTree
from u2moe_jax.training import flops
from u2moe_jax.training import objective


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
  """A batch shape.

  Attributes:
    frames: padded feature frames T_in.
    tokens: padded labels U.
    rows: utterances B.
  """

  frames: int
  tokens: int
  rows: int

  def __str__(self) -> str:
    return f'{self.frames} x {self.tokens} x {self.rows}'

  @classmethod
  def of(cls, features: Any, labels: Any) -> 'Shape':
    """The shape of a batch with these arrays."""
    return cls(features.shape[1], labels.shape[1], features.shape[0])

  @property
  def size(self) -> float:
    """Grows with the memory: attention with frames squared, the rest less."""
    return self.rows * self.frames * (self.frames + 1000.0)


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    name: of the function.
    shape: of its batches.
    call: runs it.
    seconds: that compiling it took, or loading it from the cache.
    memory_bytes: of one device, everything counted: arguments, results,
      temporaries, code; None where the compiler does not tell.
    num_flops: see `flops.count`.
  """

  name: str
  shape: Shape
  call: Any
  seconds: float
  memory_bytes: int | None
  num_flops: float


class Programs:
  """A jitted function whose last argument is a batch, by batch shape."""

  def __init__(
    self,
    jitted: Any,
    arguments: Sequence[PyTree],
    *,
    name: str,
    num_bins: int,
    sharding: jax.sharding.Sharding,
  ):
    """Compiles nothing yet.

    Args:
      jitted: the function.
      arguments: those before the batch, abstract, with shardings.
      name: for messages.
      num_bins: mel bins F.
      sharding: of the batch.
    """
    self.name = name
    self._jitted = jitted
    self._arguments = tuple(arguments)
    self._num_bins = num_bins
    self._sharding = sharding
    self._programs: dict[Shape, Program] = {}

  def __call__(self, *arguments: Any) -> Any:
    """Calls the program of the batch's shape; compiles it if there is none."""
    batch = arguments[-1]
    return self.program(Shape.of(batch.features, batch.labels)).call(*arguments)

  def program(self, shape: Shape) -> Program:
    """The program of a shape; compiles it if there is none."""
    if shape not in self._programs:
      logging.warning('%s: shape %s was not planned', self.name, shape)
      self.add(self.lower(shape)())
    return self._programs[shape]

  def add(self, program: Program) -> None:
    """Makes a program known."""
    self._programs[program.shape] = program

  def lower(self, shape: Shape) -> Any:
    """Traces; returns a function that compiles, from any thread."""
    traced = self._jitted.trace(*self._arguments, self._batch(shape))
    num_flops = flops.count(traced.jaxpr)
    lowered = traced.lower()

    def compile_lowered() -> Program:
      begun = time.monotonic()
      compiled = lowered.compile()
      return Program(
        name=self.name,
        shape=shape,
        # It refuses other shapes, where a jitted function compiles again.
        call=compiled,
        seconds=time.monotonic() - begun,
        memory_bytes=_memory(compiled),
        num_flops=num_flops,
      )

    return compile_lowered

  def _batch(self, shape: Shape) -> objective.Batch:
    def array(dtype: Any, *dimensions: int) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(dimensions, dtype, sharding=self._sharding)

    # In the types that the data side gives: a program takes no others.
    rows, frames, tokens = shape.rows, shape.frames, shape.tokens
    return objective.Batch(
      features=array(jnp.float32, rows, frames, self._num_bins),
      feature_lengths=array(jnp.int32, rows),
      labels=array(jnp.int32, rows, tokens),
      label_lengths=array(jnp.int32, rows),
      weights=array(jnp.float32, rows),
    )

  def empty_batch(self, shape: Shape) -> objective.Batch:
    """A batch without utterances."""
    return jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding),
      self._batch(shape),
    )


def _memory(compiled: Any) -> int | None:
  stats = compiled.memory_analysis()
  if stats is None:
    return None
  # Donated arguments are results as well; they take their bytes once.
  return int(
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes
  )


def compile_all(
  planned: Sequence[tuple[Programs, Shape]], *, num_threads: int = 1
) -> Generator[Program, None, None]:
  """Compiles shapes, the largest first, and makes them known.

  Args:
    planned: which shapes of which functions.
    num_threads: that compile at the same time; tracing is done by the caller.

  Yields:
    Each program once it is compiled.
  """
  # The largest first, so that what does not fit is found at once.
  ordered = sorted(planned, key=lambda pair: -pair[1].size)
  waiting: list[tuple[Programs, futures.Future]] = []
  pool = futures.ThreadPoolExecutor(num_threads)
  try:
    for programs, shape in ordered:
      # Traced here, compiled there: XLA lets other threads run, Python not.
      waiting.append((programs, pool.submit(programs.lower(shape))))
      while waiting and waiting[0][1].done():
        yield _take(waiting)
    while waiting:
      yield _take(waiting)
  finally:
    pool.shutdown(cancel_futures=True)  # if the first one is already too large


def _take(waiting: list[tuple[Programs, futures.Future]]) -> Program:
  programs, future = waiting.pop(0)
  program = future.result()
  programs.add(program)
  return program
