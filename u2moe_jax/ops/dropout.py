"""Which elements dropout keeps: a hash of the key and the place."""

import dataclasses
import math

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked
from u2moe_jax.array_types import UInt

# Two multiply-and-shift rounds, a permutation of 32 bits in which every bit of
# the input flips every bit of the output nearly half of the time; found by
# search, see https://github.com/skeeto/hash-prospector.
_MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
_SHIFTS = (16, 15, 15)
# 2**32 over the golden ratio, made odd: neighbours land far from each other.
_STEP = 0x9E3779B1


@typechecked
def keep_mask(
  words: Array, shape: tuple[int, ...], rate: float
) -> Bool[Array, '...']:
  """Draws which elements stay, each by hashing its place with the key.

  `jax.random` has no generator that is both quick on CPU and cut to the part
  of a device: `rbg` draws the masks of the global batch on each device, and
  threefry takes a hundred times as long as this. A mask needs independence to
  the eye of a network, not of a cryptographer.

  Args:
    words: the key, two random uint32.
    shape: of the mask; beyond 2**32 elements it repeats.
    rate: share that is dropped.

  Returns:
    True where an element stays.
  """
  # Numbers of the elements of the whole array, from iotas, which a device can
  # make for its part alone. They wrap beyond 2^32.
  place = jnp.zeros(shape, jnp.uint32)
  for axis, stride in enumerate(_strides(shape)):
    place += lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
  return _hash(place, words) >= _threshold(rate)


def _hash(place: Array, words: Array) -> Array:
  """32 bits that look random, for every place."""
  bits = place + words[0]
  bits = (bits ^ (bits >> _SHIFTS[0])) * jnp.uint32(_MULTIPLIERS[0])
  # Between the rounds, so that another key is another order, not a shift.
  bits = (bits ^ (bits >> _SHIFTS[1])) + words[1]
  bits *= jnp.uint32(_MULTIPLIERS[1])
  return bits ^ (bits >> _SHIFTS[2])


def _threshold(rate: float) -> Array:
  """Of all 2**32 words a share `rate` lies below."""
  return jnp.uint32(round(rate * 2**32))


def _strides(shape: tuple[int, ...]) -> list[Array]:
  """How far apart neighbours along each axis are, modulo 2**32."""
  return [
    jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    for axis in range(len(shape))
  ]


@struct.dataclass
class RowDropout:
  """Dropout of the hidden units of rows that have numbers.

  Wherever a row lies, and whichever of its units a device holds, its mask is
  that of its number.

  Attributes:
    words: the key, two random uint32.
    rows: number of each row.
    first_unit: number of the first unit.
    rate: share that is dropped.
  """

  words: UInt[Array, '2']
  rows: UInt[Array, '...']
  first_unit: UInt[Array, '']
  rate: float = struct.field(pytree_node=False)

  def block(self, start: Array | int, size: int) -> 'RowDropout':
    """That of so many rows."""
    rows = lax.dynamic_slice_in_dim(self.rows, start, size)
    return dataclasses.replace(self, rows=rows)

  def as_pairs(self) -> 'ExpertDropout':
    """For a plan in which every row is a token with one expert."""
    return ExpertDropout(
      words=self.words,
      pairs=self.rows.reshape(-1, 1),
      first_unit=self.first_unit,
      rate=self.rate,
    )


@typechecked
def drop_units(
  hidden: Float[Array, '... M'], dropout: RowDropout | None
) -> Float[Array, '... M']:
  """Zeroes a share of the elements and scales up the others.

  Args:
    hidden: the hidden units of rows.
    dropout: for as many rows, in any shape; None changes nothing.
  """
  if dropout is None:
    return hidden
  rows = dropout.rows.reshape(hidden.shape[:-1])
  return _drop(hidden, dataclasses.replace(dropout, rows=rows))


@struct.dataclass
class ExpertDropout:
  """Dropout inside of experts: each (token, slot) pair has a number.

  A pair keeps its number on its way to the row, block or device where its
  expert is, so every executor draws the same masks, on every mesh.

  Attributes:
    words: the key, two random uint32.
    pairs: numbers, different ones in the whole batch.
    first_unit: number of the first hidden unit.
    rate: share that is dropped.
  """

  words: UInt[Array, '2']
  pairs: UInt[Array, 'S J']
  first_unit: UInt[Array, '']
  rate: float = struct.field(pytree_node=False)

  @classmethod
  def of_tokens(
    cls, words: UInt[Array, '2'], *, num_tokens: int, num_kept: int, rate: float
  ) -> 'ExpertDropout':
    """For a whole batch."""
    pairs = jnp.arange(num_tokens * num_kept, dtype=jnp.uint32)
    return cls(
      words=words,
      pairs=pairs.reshape(num_tokens, num_kept),
      first_unit=jnp.uint32(0),
      rate=rate,
    )

  def of_rows(self, rows: UInt[Array, '...']) -> RowDropout:
    """That of the rows in which pairs of these numbers lie."""
    return RowDropout(
      words=self.words, rows=rows, first_unit=self.first_unit, rate=self.rate
    )


# As everywhere, the mask is drawn again for the backward pass, not kept.
@jax.custom_vjp
def _drop(hidden: Array, dropout: RowDropout) -> Array:
  seeds = _hash(dropout.rows, dropout.words)[..., None]  # [..., 1]
  shape = (1,) * dropout.rows.ndim + hidden.shape[-1:]
  units = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
  units = (units + dropout.first_unit) * jnp.uint32(_STEP)
  # Not a sum: rows whose seeds are near would have the same mask, shifted.
  kept = _hash(seeds ^ units, dropout.words[::-1]) >= _threshold(dropout.rate)
  return jnp.where(kept, hidden * (1 / (1 - dropout.rate)), 0)


def _drop_forward(
  hidden: Array, dropout: RowDropout
) -> tuple[Array, RowDropout]:
  return _drop(hidden, dropout), dropout


def _drop_backward(dropout: RowDropout, gradient: Array) -> tuple[Array, None]:
  return _drop(gradient, dropout), None


_drop.defvjp(_drop_forward, _drop_backward)
