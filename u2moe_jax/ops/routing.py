"""Routing plans: which experts a token visits, and with what weight."""

from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked
from u2moe_jax.config import RouterType


@struct.dataclass
class Routing:
  """A plan for S tokens.

  Attributes:
    expert_index: the J experts of each token, best first; E (one past the
      last expert) for a padded token, which visits none.
    weight: their weights, float32; 0 for a padded token.
    mask: True for real tokens.
    num_experts: E.
  """

  expert_index: Int[Array, 'S J']
  weight: Float[Array, 'S J']
  mask: Bool[Array, 'S']
  num_experts: int = struct.field(pytree_node=False)


@struct.dataclass
class RoutingStats:
  """What one layer's routing did, over valid tokens only.

  Attributes:
    load: share of the kept (token, slot) pairs each expert received; sums
      to 1.
    entropy: mean entropy of the router's distribution over all experts, nats.
    balance_loss: E * sum_e load_e * mean probability_e; 1 when balanced
      (Switch, arXiv 2101.03961, equation 4).
    z_loss: mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906,
      equation 5).
    dropped: share of the pairs that found no capacity.
    most_loaded: pairs of the most loaded device over the even share, where
      experts are split over devices; 1 if balanced, and where they are not.
  """

  load: Float[Array, 'E']
  entropy: Float[Array, '']
  balance_loss: Float[Array, '']
  z_loss: Float[Array, '']
  dropped: Float[Array, '']
  most_loaded: Float[Array, '']


@typechecked
def route(
  logits: Float[Array, 'S E'],
  mask: Bool[Array, 'S'],
  *,
  top_k: int,
  router_type: RouterType,
) -> Routing:
  """Chooses the experts of every token.

  Args:
    logits: router logits, float32: near-ties must not hang on bfloat16.
    mask: True for real tokens.
    top_k: experts J kept per token.
    router_type: `topk_softmax` normalises over the kept logits, so weights
      sum to 1 (and top-1 gives the router no gradient); `softmax_topk` keeps
      the probabilities among all experts (Switch).

  Returns:
    The plan.
  """
  num_experts = logits.shape[-1]
  kept, index = _top_k(logits, top_k)  # [S, J]
  if router_type == 'topk_softmax':
    weight = jax.nn.softmax(kept, axis=-1)
  else:
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [S, 1]
    weight = jnp.exp(kept - normaliser)
  valid = mask[:, None]
  # E is nobody: one-hot makes zeros of it, and it sorts behind all experts.
  return Routing(
    expert_index=jnp.where(valid, index, num_experts),
    weight=jnp.where(valid, weight, 0.0),
    mask=mask,
    num_experts=num_experts,
  )


def _top_k(logits: Array, count: int) -> tuple[Array, Array]:
  """As `lax.top_k`, of few among few, and each device keeps its tokens.

  The compiler does not split `lax.top_k` over devices: every device would get
  the logits of all tokens.
  """
  left, kept, index = logits, [], []
  experts = jnp.arange(logits.shape[-1])[None]
  for _ in range(count):
    best = jnp.argmax(left, axis=-1)  # the first one of equals
    is_best = experts == best[:, None]  # [S, E]
    kept.append(jnp.sum(jnp.where(is_best, logits, 0.0), axis=-1))
    index.append(best)
    left = jnp.where(is_best, -jnp.inf, left)
  return jnp.stack(kept, axis=-1), jnp.stack(index, axis=-1)


@typechecked
def routing_stats(
  logits: Float[Array, 'S E'],
  plan: Routing,
  *,
  num_dropped: Float[Array, ''] | float = 0.0,
  expert_parts: int = 1,
) -> RoutingStats:
  """Summarises a plan; every number is a mean over valid tokens.

  Args:
    logits: router logits.
    plan: what was chosen.
    num_dropped: pairs that found no capacity.
    expert_parts: over how many devices the experts are split, in order.
  """
  # At least 1: a batch may be nothing but padding.
  num_tokens = jnp.maximum(jnp.sum(plan.mask), 1)
  num_pairs = num_tokens * plan.weight.shape[1]
  chosen = jax.nn.one_hot(plan.expert_index, plan.num_experts)  # [S, J, E]
  load = jnp.sum(chosen, axis=(0, 1)) / num_pairs
  # The experts of a device stand next to each other.
  device_load = jnp.sum(load.reshape(expert_parts, -1), axis=1)
  # Not the logarithm of `probs`, which is -inf where one of them underflows.
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  probs = jnp.exp(log_probs)

  def mean(x: Array) -> Array:  # over valid tokens
    keep = plan.mask.reshape(plan.mask.shape + (1,) * (x.ndim - 1))
    return jnp.sum(jnp.where(keep, x, 0.0), axis=0) / num_tokens

  return RoutingStats(
    load=load,
    entropy=mean(-jnp.sum(probs * log_probs, axis=-1)),
    # The load is a count and has no gradient; the probabilities have one.
    balance_loss=plan.num_experts
    * jnp.sum(jax.lax.stop_gradient(load) * mean(probs)),
    z_loss=mean(jax.nn.logsumexp(logits, axis=-1) ** 2),
    dropped=jnp.asarray(num_dropped / num_pairs, jnp.float32),
    most_loaded=jnp.max(device_load) * expert_parts,
  )


@typechecked
def margins(logits: Float[Array, 'S E'], *, top_k: int) -> Float[Array, 'S']:
  """Gap between the last kept and the first rejected logit of each token.

  A choice with a margin near the rounding noise may differ between two
  computations of the same thing. Infinite when every expert is kept.
  """
  if top_k == logits.shape[-1]:
    return jnp.full(logits.shape[:1], jnp.inf, logits.dtype)
  best, _ = _top_k(logits, top_k + 1)
  return best[:, top_k - 1] - best[:, top_k]
