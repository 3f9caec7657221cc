"""Convolutional subsampling x4, x6 and x8, and its arithmetic."""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked
from u2moe_jax.config import Subsampling
from u2moe_jax.layers import linear
from u2moe_jax.ops import convolution
from u2moe_jax.sharding import axes


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Unpadded strided convolutions over time and mel.

  Attributes:
    stages: (kernel width, stride) of each convolution.
  """

  stages: tuple[tuple[int, int], ...]

  def output_length(self, length: Any) -> Any:
    """Frames after subsampling; works on ints and arrays, never below 0."""
    for width, stride in self.stages:
      length = (length - width) // stride + 1
    # A product, where `max` takes ints only and `jnp.maximum` makes arrays.
    return length * (length > 0)

  @property
  def rate(self) -> int:
    """Input frames per output frame."""
    rate = 1
    for _, stride in self.stages:
      rate *= stride
    return rate

  @property
  def right_context(self) -> int:
    """Input frames needed behind the first frame of an output frame."""
    context, rate = 0, 1
    for width, stride in self.stages:
      context += (width - 1) * rate
      rate *= stride
    return context

  def window(self, num_frames: int) -> int:
    """Input frames that give exactly `num_frames` output frames."""
    return (num_frames - 1) * self.rate + self.right_context + 1


_GEOMETRY: dict[str, Geometry] = {
  'conv2d': Geometry(((3, 2), (3, 2))),
  'conv2d6': Geometry(((3, 2), (5, 3))),
  'conv2d8': Geometry(((3, 2), (3, 2), (3, 2))),
}


def geometry(kind: Subsampling) -> Geometry:
  """Returns the arithmetic of a subsampling kind."""
  return _GEOMETRY[kind]


class ConvSubsampling(nn.Module):
  """Strided 2-D convolutions with ReLU, then one linear map.

  Attributes:
    kind: conv2d (x4), conv2d6 or conv2d8.
    width: output width D.
    channels: of the convolutions; 0 means D.
    dtype: compute type.
  """

  kind: Subsampling
  width: int
  channels: int = 0
  dtype: linear.Dtype = jnp.float32

  @nn.compact
  @typechecked
  def __call__(self, features: Float[Array, 'B T_in F']) -> Array:
    """Returns (B, T, D), T = geometry(kind).output_length(T_in) > 0."""
    x = features[..., None].astype(self.dtype)  # [B, T, F, 1]
    for i, (size, stride) in enumerate(geometry(self.kind).stages):
      x = jax.nn.relu(self._convolve(x, i, size, stride))
    x = jnp.swapaxes(x, 2, 3)  # [B, T, C, F]: channel-major, as the reference
    x = x.reshape(*x.shape[:2], -1)  # [B, T, C * F]
    return linear.dense(
      self.width,
      fan_in=x.shape[-1],
      kernel_axes=(axes.FEATURE, axes.EMBED),
      dtype=self.dtype,
      name='output',
    )(x)

  def _convolve(
    self, x: Float[Array, 'B T F C'], index: int, size: int, stride: int
  ) -> Array:
    channels = self.channels or self.width
    init = linear.uniform_fan_in(size * size * x.shape[-1])
    # The first makes the channels that the second sums over, so that one sum
    # over the devices follows the two; the rest is small beside the second.
    split = (None, axes.SUBSAMPLING, None, None)[index : index + 2]
    names = (axes.CONV, None, *split)
    shape = (size, size, x.shape[-1], channels)
    kernel = linear.parameter(self, f'kernel_{index}', init, names, shape)
    bias = linear.parameter(
      self, f'bias_{index}', init, names[-1:], (channels,)
    )
    x = convolution.conv2d(x, kernel.astype(x.dtype), stride=stride)
    return x + bias.astype(x.dtype)[None, None, None]
