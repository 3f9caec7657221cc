"""Dropout whose masks are the same on every mesh and cost next to nothing."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.ops import dropout as dropout_ops


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
    return _dropout(x, draw_words(self.make_rng('dropout')), self.rate)


def draw_words(key: Array) -> Array:
  """The two random uint32 that masks are hashed from."""
  return jax.random.bits(key, (2,), jnp.uint32)


# Dropout is linear and its own transpose. Drawing the mask again for the
# backward pass is quicker than keeping it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dropout(x: Array, words: Array, rate: float) -> Array:
  mask = dropout_ops.keep_mask(words, x.shape, rate)
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
