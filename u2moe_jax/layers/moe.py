"""Mixture-of-Experts feed-forward layer (U2++ MoE, arXiv 2404.16407)."""

from flax import linen as nn
from flax import struct
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked
from u2moe_jax.config import Activation
from u2moe_jax.config import MoeConfig
from u2moe_jax.layers import activations
from u2moe_jax.layers import dropout as dropout_lib
from u2moe_jax.layers import expert_parallel
from u2moe_jax.layers import linear
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops import routing
from u2moe_jax.ops.dropout import ExpertDropout
from u2moe_jax.sharding import axes


@struct.dataclass
class MoeStats:
  """What one MoE layer did.

  Attributes:
    summary: load, entropy, losses, over valid tokens.
    logits: router logits.
    expert_index: chosen experts, best first; E for padding.
    expert_weight: their weights; 0 for padding.
    margin: gap between the last kept and the first rejected logit;
      infinite for padding.
  """

  summary: routing.RoutingStats
  logits: Float[Array, 'B T E']
  expert_index: Int[Array, 'B T J']
  expert_weight: Float[Array, 'B T J']
  margin: Float[Array, 'B T']


class MoeFeedForward(nn.Module):
  """Makes a routing plan and has it carried out.

  Attributes:
    config: experts, top-k, router form, executor.
    hidden_dim: width M of each expert.
    activation: inside the experts.
    dropout: after the activation, active when a `dropout` key is given.
    separate: one array per expert and parameter, as decoding wants them.
    dtype: compute type; the router is float32.
  """

  config: MoeConfig
  hidden_dim: int
  activation: Activation = 'relu'
  dropout: float = 0.0
  separate: bool = False
  dtype: linear.Dtype = jnp.float32

  @nn.compact
  @typechecked
  def __call__(
    self, x: Float[Array, 'B T D'], mask: Bool[Array, 'B T']
  ) -> tuple[Float[Array, 'B T D'], MoeStats]:
    """Sends every valid frame through its experts; padding gets zeros."""
    batch, frames, width = x.shape
    config = self.config
    # A dropout key is what tells training from evaluation.
    training = self.has_rng('dropout')
    # Routing knows no utterances: the frames of the batch are one list.
    tokens = x.reshape(-1, width)  # [S, D]
    logits = self._router(tokens)
    token_mask = mask.reshape(-1)  # [S]
    plan = routing.route(
      logits,
      token_mask,
      top_k=config.top_k,
      router_type=config.router_type,
    )
    options = grouped_matmul.Options(
      activation=activations.get(self.activation),
      executor=config.executor,
      # At evaluation nothing is dropped: a token's answer must not depend
      # on its neighbours in the batch.
      capacity_factor=config.capacity_factor if training else None,
      block_size=config.block_size,
    )
    executed = expert_parallel.expert_feed_forward(
      tokens.astype(self.dtype),
      plan,
      self._separate_experts(width) if self.separate else self._experts(width),
      options,
      self._dropout(num_tokens=tokens.shape[0]) if training else None,
    )
    margin = routing.margins(logits, top_k=config.top_k)
    shape = (batch, frames, -1)
    stats = MoeStats(
      summary=routing.routing_stats(
        logits,
        plan,
        num_dropped=executed.num_dropped,
        expert_parts=expert_parallel.expert_parts(),
      ),
      logits=logits.reshape(shape),
      expert_index=plan.expert_index.reshape(shape),
      expert_weight=plan.weight.reshape(shape),
      margin=jnp.where(token_mask, margin, jnp.inf).reshape(batch, frames),
    )
    return executed.output.reshape(shape), stats

  def _dropout(self, *, num_tokens: int) -> ExpertDropout | None:
    if not self.dropout:
      return None
    return ExpertDropout.of_tokens(
      dropout_lib.draw_words(self.make_rng('dropout')),
      num_tokens=num_tokens,
      num_kept=self.config.top_k,
      rate=self.dropout,
    )

  def _router(self, tokens: Float[Array, 'S D']) -> Array:
    """Logits in float32: near-ties must not hang on the compute type."""
    wide = jnp.promote_types(jnp.float32, tokens.dtype)
    return linear.dense(
      self.config.num_experts,
      fan_in=tokens.shape[-1],
      kernel_axes=(axes.EMBED, axes.ROUTER),
      dtype=wide,
      use_bias=False,
      name='router',
    )(tokens.astype(wide))

  def _experts(self, width: int) -> grouped_matmul.ExpertWeights:
    num, hidden = self.config.num_experts, self.hidden_dim

    # `fan_in` is told: from the shape one would count the experts as inputs.
    def param(
      name: str, fan_in: int, shape: tuple[int, ...], names: tuple[str, ...]
    ) -> Array:
      init, names = linear.uniform_fan_in(fan_in), (axes.EXPERT, *names)
      kernel = linear.parameter(self, name, init, names, (num, *shape))
      return kernel.astype(self.dtype)

    into, out = (axes.EMBED, axes.MLP), (axes.MLP, axes.EMBED)
    return grouped_matmul.ExpertWeights(
      w_in=param('w_in', width, (width, hidden), into),
      b_in=param('b_in', width, (hidden,), into[1:]),
      w_out=param('w_out', hidden, (hidden, width), out),
      b_out=param('b_out', hidden, (width,), out[1:]),
    )

  def _separate_experts(self, width: int) -> grouped_matmul.SeparateWeights:
    experts = (
      _Expert(self.hidden_dim, width, dtype=self.dtype, name=f'expert_{e}')
      for e in range(self.config.num_experts)
    )
    return tuple(expert() for expert in experts)


class _Expert(nn.Module):
  """Holds the parameters of one expert.

  Attributes:
    hidden_dim: M.
    width: D.
    dtype: compute type.
  """

  hidden_dim: int
  width: int
  dtype: linear.Dtype

  @nn.compact
  def __call__(self) -> grouped_matmul.SeparateExpert:
    hidden, width = self.hidden_dim, self.width

    def kernel(name: str, names: tuple[str, ...], shape: tuple[int, int]):
      # Transposed, so the inputs are the second axis.
      init = linear.uniform_fan_in(shape[1])
      return linear.weight(self, name, init, names, shape, dtype=self.dtype)

    def bias(name: str, axis: str, size: int, fan_in: int) -> Array:
      init = linear.uniform_fan_in(fan_in)
      value = linear.parameter(self, name, init, (axis,), (size,))
      return value.astype(self.dtype)

    return grouped_matmul.SeparateExpert(
      w_in=kernel('w_in', (axes.MLP, axes.EMBED), (hidden, width)),
      b_in=bias('b_in', axes.MLP, hidden, width),
      w_out=kernel('w_out', (axes.EMBED, axes.MLP), (width, hidden)),
      b_out=bias('b_out', axes.EMBED, width, hidden),
    )
