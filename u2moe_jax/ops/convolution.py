"""Convolutions written as what XLA does fast.

XLA:CPU runs `lax.conv_general_dilated` far below the speed of its matrix
product (depthwise 40 times, small conv2d 3 times slower), so the depthwise
form is a sum of shifted products and the strided one is patches times a
matrix.
"""

import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked
from u2moe_jax.ops import products


@typechecked
def depthwise_conv(
  x: Float[Array, 'B T_in D'], kernel: Float[Array, 'W D']
) -> Float[Array, 'B T D']:
  """Convolves each channel over time, unpadded: T = T_in - W + 1."""
  width = kernel.shape[0]
  num_frames = x.shape[1] - width + 1
  # The kernel is not turned round, as in all frameworks. Its axes are added by
  # hand because the tests make implicit rank promotion an error.
  return sum(
    x[:, w : w + num_frames] * kernel[w][None, None] for w in range(width)
  )


@typechecked
def conv2d(
  x: Float[Array, 'B T_in F_in D_in'],
  kernel: Float[Array, 'W W D_in D'],
  *,
  stride: int,
) -> Float[Array, 'B T F D']:
  """Convolves over (time, mel), unpadded, with one stride for both axes.

  Args:
    x: input, channels last; both spatial sizes must be at least W.
    kernel: (time, mel, in, out) kernel.
    stride: step along time and mel.

  Returns:
    (B, (T_in - W) // stride + 1, (F_in - W) // stride + 1, D).
  """
  width = kernel.shape[0]
  num_frames = (x.shape[1] - width) // stride + 1
  num_bins = (x.shape[2] - width) // stride + 1

  def tap(i: int, j: int) -> Array:
    # Each slice ends at the last window's element, so all are equally long.
    rows = x[:, i : i + (num_frames - 1) * stride + 1 : stride]
    return rows[:, :, j : j + (num_bins - 1) * stride + 1 : stride]

  # Time before mel: the order in which the kernel is flattened below.
  taps = [tap(i, j) for i in range(width) for j in range(width)]
  # Channels keep an axis of their own, so that a mesh can split them.
  patches = jnp.stack(taps, axis=-2)  # [B, T, F, W * W, D_in]
  # Over taps and channels at once; the kernel as [W * W, D_in, D].
  return products.tensordot(patches, kernel.reshape(-1, *kernel.shape[2:]), 2)
