"""Conformer convolution module, causal or not; cache in, cache out."""

from collections.abc import Callable

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked
from u2moe_jax.config import Activation
from u2moe_jax.config import ConvNorm
from u2moe_jax.layers import activations
from u2moe_jax.layers import linear
from u2moe_jax.ops import convolution
from u2moe_jax.sharding import axes

EPSILON = 1e-5  # of the norms
# The share of the new batch: momentum as PyTorch means it, not as flax does.
_MOMENTUM = 0.1


@struct.dataclass
class RunningStats:
  """Running batch-norm statistics: a buffer, not a parameter."""

  mean: Float[Array, '*L D']
  variance: Float[Array, '*L D']


class ConvolutionModule(nn.Module):
  """Pointwise, GLU, depthwise, norm, activation, pointwise.

  Attributes:
    kernel_width: depthwise kernel W.
    causal: look left only, over W - 1 frames.
    norm: layer_norm, rms_norm or batch_norm.
    activation: after the norm.
    padding_leak: keep what padded frames hold before the depthwise kernel, as
      the reference does; matters for the non-causal form only.
    batch_norm_padding: count padded frames in training statistics.
    folded: a batch norm is already in the depthwise kernel and bias.
    dtype: compute type.
  """

  kernel_width: int
  causal: bool = True
  norm: ConvNorm = 'layer_norm'
  activation: Activation = 'swish'
  padding_leak: bool = False
  batch_norm_padding: bool = False
  folded: bool = False
  dtype: linear.Dtype = jnp.float32

  @nn.compact
  @typechecked
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    mask: Bool[Array, 'B T'],
    *,
    history: Float[Array, 'B P D'] | None = None,
    running: RunningStats | None = None,
  ) -> tuple[Float[Array, 'B T D'], Array, RunningStats | None]:
    """Convolves over time.

    Args:
      x: frames.
      mask: True for real frames; padded ones are zeroed before and after.
      history: the last W - 1 inputs of this module (causal only); None means
        zeros, the start of an utterance.
      running: batch-norm statistics; used at evaluation, updated in training
        (that is, when a `dropout` key is given).

    Returns:
      Outputs; the inputs with their history in front (B, P + T, D), from
      which the next chunk takes its own; and the updated statistics, None
      without batch norm.
    """
    width = x.shape[-1]
    x = jnp.where(mask[..., None], x, 0.0)
    if self.causal:
      shape = (x.shape[0], self.kernel_width - 1, width)
      history = jnp.zeros(shape, x.dtype) if history is None else history
      # In front of the first pointwise map: its bias acts on the history too.
      x = jnp.concatenate([history.astype(x.dtype), x], axis=1)
    inputs = x
    x = linear.dense(
      2 * width,
      fan_in=width,
      kernel_axes=(axes.EMBED, axes.CONV_CHANNEL),
      dtype=self.dtype,
      name='pointwise_in',
    )(x)
    # Gated linear unit (arXiv 1612.08083).
    value, gate = jnp.split(x, 2, axis=-1)
    x = value * jax.nn.sigmoid(gate)
    if not self.causal:
      # The bias of the map before has filled the padding again. A causal frame
      # never sees it: padding lies to its right.
      if not self.padding_leak:
        x = jnp.where(mask[..., None], x, 0.0)
      half = self.kernel_width // 2
      x = jnp.pad(x, ((0, 0), (half, half), (0, 0)))
    x = self._depthwise(x)
    x, running = self._normalise(x, mask, running)
    x = activations.get(self.activation)(x.astype(self.dtype))
    x = linear.dense(
      width,
      fan_in=width,
      kernel_axes=(axes.CONV_CHANNEL, axes.EMBED),
      dtype=self.dtype,
      name='pointwise_out',
    )(x)
    return jnp.where(mask[..., None], x, 0.0), inputs, running

  def _depthwise(self, x: Float[Array, 'B T_in D']) -> Array:
    width = x.shape[-1]
    init = linear.uniform_fan_in(self.kernel_width)
    names = (axes.CONV, axes.CONV_CHANNEL)
    shape = (self.kernel_width, width)
    kernel = linear.parameter(self, 'depthwise_kernel', init, names, shape)
    bias = linear.parameter(self, 'depthwise_bias', init, names[1:], shape[1:])
    x = convolution.depthwise_conv(x, kernel.astype(x.dtype))
    return x + bias.astype(x.dtype)[None, None]

  def _normalise(
    self,
    x: Float[Array, 'B T D'],
    mask: Bool[Array, 'B T'],
    running: RunningStats | None,
  ) -> tuple[Array, RunningStats | None]:
    if self.norm == 'layer_norm':
      return linear.layer_norm('norm')(x), None
    if self.norm == 'rms_norm':
      return self._rms_norm(x), None
    if self.folded:
      return x, None
    if running is None:
      raise ValueError('batch_norm needs its running statistics (buffers)')
    # float32 at least: sums over all frames of a batch have few digits left in
    # bfloat16.
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, variance = running.mean, running.variance
    # A dropout key is what tells training from evaluation.
    if self.has_rng('dropout'):
      counted = jnp.ones_like(mask) if self.batch_norm_padding else mask
      mean, variance, running = _batch_statistics(x, counted, running)
    x = (x - mean[None, None]) * jax.lax.rsqrt(variance + EPSILON)[None, None]
    scale = self._channel_param('scale', nn.initializers.ones, x)
    bias = self._channel_param('bias', nn.initializers.zeros, x)
    return x * scale[None, None] + bias[None, None], running

  def _rms_norm(self, x: Float[Array, 'B T D']) -> Array:
    """Scales by 1 + offset, as the reference does; it stores the offset."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    power = jnp.mean(x**2, axis=-1, keepdims=True)
    offset = self._channel_param('offset', nn.initializers.zeros, x)
    return x * jax.lax.rsqrt(power + EPSILON) * (1 + offset)[None, None]

  def _channel_param(
    self, name: str, init: Callable[..., Array], x: Array
  ) -> Array:
    names = (axes.CONV_CHANNEL,)
    return linear.parameter(self, f'norm_{name}', init, names, x.shape[-1:])


def _batch_statistics(
  x: Float[Array, 'B T D'], mask: Bool[Array, 'B T'], running: RunningStats
) -> tuple[Array, Array, RunningStats]:
  """Batch mean and variance over counted frames, and the running update."""
  # Under jit B is the batch of all devices, and so are these sums.
  total = jnp.sum(mask)
  count = jnp.maximum(total, 1).astype(x.dtype)
  keep = mask[..., None]
  mean = jnp.sum(jnp.where(keep, x, 0.0), axis=(0, 1)) / count
  # In two passes: E[x^2] - E[x]^2 cancels where the mean is large.
  centred = jnp.where(keep, x - mean[None, None], 0.0)
  variance = jnp.sum(centred**2, axis=(0, 1)) / count
  # The running variance is unbiased, the one used to normalise is not.
  unbiased = variance * count / jnp.maximum(count - 1, 1)

  def move(old: Array, new: Array) -> Array:
    # A buffer: the loss of this batch must not reach it by its gradient.
    moved = (1 - _MOMENTUM) * old + _MOMENTUM * jax.lax.stop_gradient(new)
    # A batch may be nothing but empty rows, which have no mean.
    return jnp.where(total > 0, moved, old)

  updated = RunningStats(
    mean=move(running.mean, mean), variance=move(running.variance, unbiased)
  )
  return mean, variance, updated
