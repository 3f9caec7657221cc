"""The MoE layer by executor, against one dense expert."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import harness
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops import quantization
from u2moe_jax.ops import routing

_WIDTH, _HIDDEN, _EXPERTS, _TOP_K = 640, 2560, 8, 2
# A streaming chunk, a few of them, utterances of 10, 40 and 80 seconds; and
# what an accelerator gets in training.
_TOKENS = {'cpu': (16, 64, 249, 996, 1992)}
_TOKENS_ELSEWHERE = (4096, 8192, 16384, 32768)
_DTYPES = {'cpu': 'float32'}
# (executor, layout); only `blocked` makes use of separate weights.
_CASES: tuple[tuple[str, str], ...] = (
  ('blocked', 'separate'),
  ('blocked', 'stacked'),
  ('capacity', 'stacked'),
  ('capacity_2.0', 'stacked'),
  ('ragged', 'stacked'),
  ('dense', 'stacked'),
  ('tokamax', 'stacked'),
)


def _weights(dtype: Any) -> grouped_matmul.ExpertWeights:
  keys = jax.random.split(jax.random.key(0), 2)
  shape = (_EXPERTS, _WIDTH, _HIDDEN)
  w_in = 0.04 * jax.random.normal(keys[0], shape, dtype)
  w_out = 0.02 * jax.random.normal(keys[1], (_EXPERTS, _HIDDEN, _WIDTH), dtype)
  return grouped_matmul.ExpertWeights(
    w_in=w_in,
    b_in=jnp.zeros((_EXPERTS, _HIDDEN), dtype),
    w_out=w_out,
    b_out=jnp.zeros((_EXPERTS, _WIDTH), dtype),
  )


def _in_8_bits(
  experts: grouped_matmul.SeparateWeights,
) -> grouped_matmul.SeparateWeights:
  def narrow(kernel: Any) -> quantization.Int8Matrix:
    # Separate kernels lie transposed, so inputs are the second axis.
    quantized = quantization.quantize(np.asarray(kernel), inputs=(1,))
    return jax.tree.map(jnp.asarray, quantized)

  return tuple(
    dataclasses.replace(
      expert, w_in=narrow(expert.w_in), w_out=narrow(expert.w_out)
    )
    for expert in experts
  )


def _plan(num_tokens: int) -> routing.Routing:
  logits = jax.random.normal(jax.random.key(1), (num_tokens, _EXPERTS))
  mask = jnp.ones((num_tokens,), bool)
  return routing.route(logits, mask, top_k=_TOP_K, router_type='topk_softmax')


def _one_expert(x: jax.Array, weights: Any, plan: routing.Routing):
  """A dense layer of the size of an expert: what the ratios refer to."""
  del plan
  hidden = jax.nn.silu(x @ weights.w_in + weights.b_in[None])
  return hidden @ weights.w_out + weights.b_out[None]


def _experts(executor: str) -> Callable[..., jax.Array]:
  # `capacity_2.0`: an executor and its factor.
  name, _, factor = executor.partition('_')
  options = grouped_matmul.Options(
    jax.nn.silu,
    executor=name,
    capacity_factor=float(factor) if factor else None,
  )

  def forward(x: jax.Array, weights: Any, plan: routing.Routing):
    return grouped_matmul.expert_feed_forward(x, plan, weights, options).output

  return forward


def _with_backward(forward: Callable[..., jax.Array]) -> Callable[..., Any]:
  """Gradients by tokens and weights, of a sum that keeps every product."""

  def loss(x: jax.Array, weights: Any, plan: routing.Routing):
    output = forward(x, weights, plan)
    # Squared, so that the gradient of no product is a constant.
    return jnp.sum(output.astype(jnp.float32) ** 2)

  return jax.grad(loss, argnums=(0, 1))


_PASSES: dict[str, Callable[[Any], Any]] = {
  'forward': lambda forward: forward,
  'forward_backward': _with_backward,
}


def run(options: harness.Options) -> Iterator[dict[str, Any]]:
  """8 experts, top-2, D 640, M 2560; one line for each way to compute it.

  `ratio_to_dense` is against one dense layer of the size of an expert; 2 is
  ideal, for top-2. `capacity` has a slot for every token, `capacity_2.0` twice
  the even share, as in training, and may drop.
  """
  platform = jax.default_backend()
  default = _DTYPES.get(platform, 'bfloat16')
  chosen = options.dtype or default
  # What 8 bits are compared with is in floats.
  dtype = jnp.dtype(default if chosen == 'int8' else chosen)
  stacked = _weights(dtype)
  layouts: dict[str, Any] = {
    'stacked': stacked,
    'separate': grouped_matmul.separate(stacked),
  }
  cases, passes_of = _CASES, _PASSES
  if chosen == 'int8':
    layouts['separate'] = _in_8_bits(layouts['separate'])
    cases = tuple(case for case in _CASES if case[1] == 'separate')
    # Rounded weights have no gradient.
    passes_of = {'forward': _PASSES['forward']}
  for num_tokens in _TOKENS.get(platform, _TOKENS_ELSEWHERE):
    x = jax.random.normal(jax.random.key(2), (num_tokens, _WIDTH), dtype)
    plan = _plan(num_tokens)
    # Short calls vary more.
    repeats = max(options.repeats, 2000 // num_tokens)
    for name, passes in passes_of.items():
      measure = functools.partial(_measure, passes, x, plan, repeats)
      one = grouped_matmul.one_expert(stacked, 0)
      dense = measure(_one_expert, one)['wall_s']
      for executor, layout in cases:
        record = {
          'bench': 'moe',
          'executor': executor,
          'layout': layout,
          'tokens': num_tokens,
          'pass': name,
          'dtype': chosen,
        }
        try:
          walls = measure(_experts(executor), layouts[layout])
        except ValueError as error:  # an optional extra that is not installed
          yield {**record, 'error': str(error)}
          continue
        ratio = round(walls['wall_s'] / dense, 2)
        yield {**record, **walls, 'ratio_to_dense': ratio}


def _measure(
  passes: Callable[[Any], Any],
  x: jax.Array,
  plan: routing.Routing,
  repeats: int,
  forward: Callable[..., jax.Array],
  weights: Any,
) -> dict[str, float]:
  function = jax.jit(passes(forward))
  return harness.measure(lambda: function(x, weights, plan), repeats)
