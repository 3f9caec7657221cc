"""Linear maps and norms with logical axes and the recipe's initial values."""

from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

from u2moe_jax.sharding import axes

Dtype = jnp.dtype | type | str


def uniform_fan_in(fan_in: int):
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the recipe's weights and biases."""
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def dense(
  features: int | Sequence[int],
  *,
  fan_in: int,
  kernel_axes: Sequence[str],
  dtype: Dtype,
  contract: int = 1,
  use_bias: bool = True,
  name: str | None = None,
) -> nn.DenseGeneral:
  """A linear layer over the last `contract` axes.

  Args:
    features: output size, or sizes.
    fan_in: inputs summed per output; sets the range of the initial values.
    kernel_axes: logical axes of the kernel; its last ones name the bias.
    dtype: compute type; parameters are float32.
    contract: how many trailing input axes are summed over.
    use_bias: whether there is a bias.
    name: module name.
  """
  sizes = (features,) if isinstance(features, int) else tuple(features)
  bias_axes = tuple(kernel_axes[len(kernel_axes) - len(sizes) :])
  init = uniform_fan_in(fan_in)
  return nn.DenseGeneral(
    sizes,
    axis=tuple(range(-contract, 0)),
    use_bias=use_bias,
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(init, tuple(kernel_axes)),
    bias_init=nn.with_logical_partitioning(init, bias_axes),
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
