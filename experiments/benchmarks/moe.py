"""The MoE layer by executor, against one dense expert."""

from collections.abc import Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import harness
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops import routing

_WIDTH, _HIDDEN, _EXPERTS, _TOP_K = 640, 2560, 8, 2
_TOKENS = (16, 64, 249, 996)
_EXECUTORS = ('dense', 'capacity', 'blocked', 'ragged')


def _weights(num_experts: int) -> grouped_matmul.ExpertWeights:
  keys = jax.random.split(jax.random.key(0), 2)
  return grouped_matmul.ExpertWeights(
    w_in=0.04 * jax.random.normal(keys[0], (num_experts, _WIDTH, _HIDDEN)),
    b_in=jnp.zeros((num_experts, _HIDDEN)),
    w_out=0.02 * jax.random.normal(keys[1], (num_experts, _HIDDEN, _WIDTH)),
    b_out=jnp.zeros((num_experts, _WIDTH)),
  )


def run(options: harness.Options) -> Iterator[dict[str, Any]]:
  """Forward passes, 8 experts, top-2, D 640, M 2560."""
  weights = _weights(_EXPERTS)

  def plan(num_tokens: int) -> routing.Routing:
    logits = jax.random.normal(jax.random.key(1), (num_tokens, _EXPERTS))
    mask = jnp.ones((num_tokens,), bool)
    return routing.route(logits, mask, top_k=_TOP_K, router_type='topk_softmax')

  @jax.jit
  def one_expert(x, w):
    hidden = jax.nn.silu(x @ w.w_in[0] + w.b_in[:1])
    return hidden @ w.w_out[0] + w.b_out[:1]

  for num_tokens in _TOKENS:
    x = jax.random.normal(jax.random.key(2), (num_tokens, _WIDTH))
    one = _weights(1)
    base = harness.measure(
      functools.partial(one_expert, x, one), options.repeats
    )
    for executor in _EXECUTORS:

      @jax.jit
      def forward(x, w, p, executor=executor):
        return grouped_matmul.expert_feed_forward(
          x, p, w, activation=jax.nn.silu, executor=executor
        ).output

      routed = plan(num_tokens)
      walls = harness.measure(
        functools.partial(forward, x, weights, routed), options.repeats
      )
      yield {
        'bench': 'moe',
        'executor': executor,
        'layout': 'stacked',
        'tokens': num_tokens,
        **walls,
        'ratio_to_dense': round(walls['wall_s'] / base['wall_s'], 2),
      }
