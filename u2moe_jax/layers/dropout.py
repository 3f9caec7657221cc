"""Dropout whose masks are the same on every mesh and cost next to nothing."""

import functools
import math

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked

# Two multiply-and-shift rounds, a permutation of 32 bits in which every bit of
# the input flips every bit of the output nearly half of the time; found by
# search, see https://github.com/skeeto/hash-prospector.
_MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
_SHIFTS = (16, 15, 15)


class Dropout(nn.Module):
  """Zeroes a share of the elements and scales up the others.

  Srivastava et al., JMLR 15 (2014). Active when a `dropout` key is given to
  `apply`; otherwise the input is returned.

  Attributes:
    rate: share of the elements that are dropped, at least 0 and below 1.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
    if not 0 <= self.rate < 1:
      raise ValueError(f'dropout rate {self.rate} is not in [0, 1)')
    if self.rate == 0 or not self.has_rng('dropout'):
      return x
    words = jax.random.bits(self.make_rng('dropout'), (2,), jnp.uint32)
    return _dropout(x, words, self.rate)


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
  bits = place + words[0]
  bits = (bits ^ (bits >> _SHIFTS[0])) * jnp.uint32(_MULTIPLIERS[0])
  # Between the rounds, so that another key is another order, not a shift.
  bits = (bits ^ (bits >> _SHIFTS[1])) + words[1]
  bits *= jnp.uint32(_MULTIPLIERS[1])
  bits ^= bits >> _SHIFTS[2]
  # Of all 2^32 words a share `rate` lies below.
  return bits >= jnp.uint32(round(rate * 2**32))


def _strides(shape: tuple[int, ...]) -> list[Array]:
  """How far apart neighbours along each axis are, modulo 2**32."""
  return [
    jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    for axis in range(len(shape))
  ]


# Dropout is linear and its own transpose. Drawing the mask again for the
# backward pass is quicker than keeping it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dropout(x: Array, words: Array, rate: float) -> Array:
  mask = keep_mask(words, x.shape, rate)
  return jnp.where(mask, x * (1 / (1 - rate)), 0)


def _dropout_forward(
  x: Array, words: Array, rate: float
) -> tuple[Array, Array]:
  return _dropout(x, words, rate), words


def _dropout_backward(
  rate: float, words: Array, gradient: Array
) -> tuple[Array, None]:
  return _dropout(gradient, words, rate), None


_dropout.defvjp(_dropout_forward, _dropout_backward)
