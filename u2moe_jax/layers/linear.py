"""Linear maps and norms with logical axes and the recipe's initial values."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import cast
from typing import TypeAlias

from flax import linen as nn
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.sharding import axes

Dtype: TypeAlias = jax.typing.DTypeLike


def uniform_fan_in(fan_in: int):
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the recipe's weights and biases."""
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def parameter(
  module: nn.Module,
  name: str,
  init: Callable[..., Array],
  names: Sequence[str | None],
  shape: Sequence[int],
) -> Array:
  """Declares a float32 parameter with logical axes; returns its value."""
  boxed = nn.with_logical_partitioning(init, tuple(names))
  return cast(Array, module.param(name, boxed, tuple(shape)))


class Linear(nn.Module):
  """A linear map of the last `contract` axes to `features`.

  Attributes:
    features: output sizes.
    fan_in: inputs summed per output; sets the range of the initial values.
    kernel_axes: logical axes of the kernel; its last ones name the bias.
    dtype: compute type; parameters are float32.
    contract: how many trailing input axes are summed over.
    use_bias: whether there is a bias.
  """

  features: tuple[int, ...]
  fan_in: int
  kernel_axes: tuple[str, ...]
  dtype: Dtype = jnp.float32
  contract: int = 1
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
    inputs = x.shape[x.ndim - self.contract :]
    init = uniform_fan_in(self.fan_in)
    kernel = parameter(
      self, 'kernel', init, self.kernel_axes, (*inputs, *self.features)
    )
    x = jnp.tensordot(
      x.astype(self.dtype), kernel.astype(self.dtype), axes=self.contract
    )
    if not self.use_bias:
      return x
    bias = parameter(
      self, 'bias', init, self.kernel_axes[self.contract :], self.features
    )
    return x + bias.astype(self.dtype).reshape(
      (1,) * (x.ndim - len(self.features)) + self.features
    )


def dense(
  features: int | Sequence[int],
  *,
  fan_in: int,
  kernel_axes: Sequence[str],
  dtype: Dtype,
  contract: int = 1,
  use_bias: bool = True,
  name: str | None = None,
) -> Linear:
  """Builds a `Linear`; one output size may be given as a number."""
  sizes = (features,) if isinstance(features, int) else tuple(features)
  return Linear(
    sizes,
    fan_in,
    tuple(kernel_axes),
    dtype=dtype,
    contract=contract,
    use_bias=use_bias,
    name=name,
  )


def layer_norm(name: str | None = None) -> nn.LayerNorm:
  """LayerNorm over the model width, in float32, epsilon 1e-5."""
  partitioned = nn.with_logical_partitioning
  return nn.LayerNorm(
    epsilon=1e-5,
    use_fast_variance=False,
    scale_init=partitioned(nn.initializers.ones, (axes.ACTIVATION_EMBED,)),
    bias_init=partitioned(nn.initializers.zeros, (axes.ACTIVATION_EMBED,)),
    name=name,
  )
