"""Dense position-wise feed-forward layer."""

from flax import linen as nn
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked
from u2moe_jax.config import Activation
from u2moe_jax.layers import activations
from u2moe_jax.layers import dropout as dropout_lib
from u2moe_jax.layers import linear
from u2moe_jax.sharding import axes


class FeedForward(nn.Module):
  """Linear, activation, dropout, linear.

  Attributes:
    hidden_dim: width M between the two maps.
    activation: between the two maps.
    dropout: after the activation, active when a `dropout` key is given.
    dtype: compute type.
  """

  hidden_dim: int
  activation: Activation = 'relu'
  dropout: float = 0.0
  dtype: linear.Dtype = jnp.float32

  @nn.compact
  @typechecked
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    width = x.shape[-1]
    hidden = linear.dense(
      self.hidden_dim,
      fan_in=width,
      kernel_axes=(axes.EMBED, axes.MLP),
      dtype=self.dtype,
      name='w_in',
    )(x)
    hidden = activations.get(self.activation)(hidden)
    hidden = dropout_lib.Dropout(self.dropout)(hidden)
    return linear.dense(
      width,
      fan_in=self.hidden_dim,
      kernel_axes=(axes.MLP, axes.EMBED),
      dtype=self.dtype,
      name='w_out',
    )(hidden)
