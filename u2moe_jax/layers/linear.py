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
from u2moe_jax.array_types import PyTree
from u2moe_jax.ops import quantization
from u2moe_jax.sharding import axes

Dtype: TypeAlias = jax.typing.DTypeLike


def uniform_fan_in(fan_in: int):
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the recipe's weights and biases."""
  # What PyTorch gives linear maps and convolutions by default.
  bound = fan_in**-0.5

  def init(
    key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32
  ) -> Array:
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


def weight(
  module: nn.Module,
  name: str,
  init: Callable[..., Array],
  names: Sequence[str | None],
  shape: Sequence[int],
  *,
  dtype: Dtype,
) -> quantization.Matrix:
  """Declares a parameter to compute with in `dtype`, or in 8 bits.

  A checkpoint may have it in 8 bits (`models/inference.py`): then its scale
  stands beside it, and no other parameter is asked for.
  """
  # flax compares the shape of what a checkpoint gives, not the type, so values
  # in 8 bits pass.
  value = parameter(module, name, init, names, shape)
  scale = scale_name(name)
  if not module.has_variable('params', scale):
    return value.astype(dtype)
  return quantization.Int8Matrix(
    values=value, scale=module.get_variable('params', scale)
  )


def scale_name(name: str) -> str:
  """The name of the scale of a parameter in 8 bits."""
  return f'{name}_scale'


def float_kernel(params: PyTree) -> Array:
  """The kernel among the parameters of a `Linear` of one input axis."""
  scale = params.get(scale_name('kernel'))
  if scale is None:
    return params['kernel']
  return quantization.dequantize(
    quantization.Int8Matrix(values=params['kernel'], scale=scale)
  )


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
    kernel = weight(
      self,
      'kernel',
      init,
      self.kernel_axes,
      (*inputs, *self.features),
      dtype=self.dtype,
    )
    x = quantization.tensordot(
      x.astype(self.dtype), kernel, contract=self.contract
    )
    if not self.use_bias:
      return x
    bias = parameter(
      self, 'bias', init, self.kernel_axes[self.contract :], self.features
    )
    # As many axes as x has; implicit rank promotion is an error in the tests.
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
  # Without `dtype` the result has that of the parameters, float32; who needs
  # another casts. The slow variance is the one that does not cancel where the
  # mean is large.
  return nn.LayerNorm(
    epsilon=1e-5,
    use_fast_variance=False,
    scale_init=partitioned(nn.initializers.ones, (axes.ACTIVATION_EMBED,)),
    bias_init=partitioned(nn.initializers.zeros, (axes.ACTIVATION_EMBED,)),
    name=name,
  )
