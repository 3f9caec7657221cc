"""One Conformer block with macaron feed-forward layers, dense or MoE."""

from flax import linen as nn
from flax import struct
import jax.numpy as jnp

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked
from u2moe_jax.layers import attention
from u2moe_jax.layers import convolution
from u2moe_jax.layers import dropout as dropout_lib
from u2moe_jax.layers import feed_forward
from u2moe_jax.layers import linear
from u2moe_jax.layers import moe
from u2moe_jax.layers import positional
from u2moe_jax.sharding import axes


@struct.dataclass
class BlockContext:
  """What every block of a pass shares.

  Attributes:
    frame_mask: True for real frames.
    attention_mask: True where a query may look; P counts cached and new.
    key_embedding: position embedding of every key (rel_pos), or None.
    rotation: rotary angles of the new frames (rope_pos), or None.
  """

  frame_mask: Bool[Array, 'B T']
  attention_mask: Bool[Array, '#B #T P']
  key_embedding: Float[Array, '#B P D'] | None = None
  rotation: positional.Rotation | None = None


@struct.dataclass
class BlockState:
  """What one block takes in and gives back; None where it does not apply.

  Attributes:
    past: cached keys and values in; all P keys and values out.
    history: the convolution's last W - 1 inputs in; all of its inputs, the
      history in front, out.
    running: batch-norm statistics.
  """

  past: attention.KeyValue | None = None
  history: Float[Array, 'B W D'] | None = None
  running: convolution.RunningStats | None = None


@struct.dataclass
class BlockOutput:
  """A block's side results.

  Attributes:
    state: the updated state.
    output: the block's output frames.
    moe: statistics of each MoE layer, `macaron` before `final`; empty when
      dense.
  """

  state: BlockState
  output: Float[Array, 'B T D']
  moe: dict[str, moe.MoeStats]


class ConformerBlock(nn.Module):
  """Half FFN, attention, convolution, half FFN, norm; all pre-norm.

  Attributes:
    config: the encoder.
    experts: which feed-forward layers have experts.
    form: of the parameters.
    dtype: compute type.
  """

  config: config_lib.EncoderConfig
  experts: tuple[str, ...]
  form: config_lib.Form = 'training'
  dtype: linear.Dtype = jnp.float32

  @nn.compact
  @typechecked
  def __call__(
    self, x: Float[Array, 'B T D'], state: BlockState, context: BlockContext
  ) -> tuple[Float[Array, 'B T D'], BlockOutput]:
    config = self.config
    # Two half steps make a whole one (Conformer, arXiv 2005.08100).
    half = 0.5 if config.macaron else 1.0
    # Filled by the feed-forward layers, in the order of the pass.
    stats: dict[str, moe.MoeStats] = {}
    if config.macaron:
      x += half * self._feed_forward(x, 'macaron', context, stats)
    attended, keys = self._attention(x, state, context)
    x += attended
    convolved, history, running = self._convolution(x, state, context)
    x += convolved
    x += half * self._feed_forward(x, 'final', context, stats)
    x = linear.layer_norm('norm_output')(x).astype(self.dtype)
    # Between blocks the utterances are split over devices and nothing else,
    # whatever the kernels of the block would suggest to the compiler.
    x = nn.with_logical_constraint(
      x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)
    )
    state = BlockState(past=keys, history=history, running=running)
    return x, BlockOutput(state=state, output=x, moe=stats)

  def _normed(self, name: str, x: Float[Array, 'B T D']) -> Array:
    # The norm gives float32; what follows is in the compute type.
    return linear.layer_norm(f'norm_{name}')(x).astype(self.dtype)

  def _dropout(self, x: Float[Array, 'B T D']) -> Array:
    return dropout_lib.Dropout(self.config.dropout)(x)

  def _feed_forward(
    self,
    x: Float[Array, 'B T D'],
    name: str,
    context: BlockContext,
    stats: dict[str, moe.MoeStats],
  ) -> Array:
    config = self.config
    x = self._normed(f'ffn_{name}', x)
    if name in self.experts:
      experts = moe.MoeFeedForward(
        config.moe,
        config.ffn_dim,
        config.activation,
        config.dropout,
        separate=self.form == 'inference',
        dtype=self.dtype,
        name=f'ffn_{name}',
      )
      # Padding visits no expert: it must fill no slot and sway no statistic.
      x, stats[name] = experts(x, context.frame_mask)
      return self._dropout(x)
    layer = feed_forward.FeedForward(
      config.ffn_dim,
      config.activation,
      config.dropout,
      dtype=self.dtype,
      name=f'ffn_{name}',
    )
    return self._dropout(layer(x))

  def _attention(
    self, x: Float[Array, 'B T D'], state: BlockState, context: BlockContext
  ):
    x = self._normed('attention', x)
    layer = attention.MultiHeadAttention(
      self.config.num_heads,
      self.config.attention_dropout,
      key_position=self.config.position == 'rel_pos',
      fused=self.form == 'inference',
      dtype=self.dtype,
      name='attention',
    )
    x, keys = layer(
      x,
      x,
      context.attention_mask,
      past=state.past,
      key_embedding=context.key_embedding,
      rotation=context.rotation,
    )
    return self._dropout(x), keys

  def _convolution(
    self, x: Float[Array, 'B T D'], state: BlockState, context: BlockContext
  ) -> tuple[Array, Array, convolution.RunningStats | None]:
    config = self.config
    layer = convolution.ConvolutionModule(
      config.conv_kernel,
      config.causal_conv,
      config.conv_norm,
      config.activation,
      config.conv_padding_leak,
      config.batch_norm_padding,
      folded=self.form == 'inference',
      dtype=self.dtype,
      name='convolution',
    )
    x, history, running = layer(
      self._normed('convolution', x),
      context.frame_mask,
      history=state.history,
      running=state.running,
    )
    return self._dropout(x), history, running
