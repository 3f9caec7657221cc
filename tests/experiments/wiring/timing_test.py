"""Times of warm calls."""

import jax
import jax.numpy as jnp

from experiments.wiring import timing


def test_the_time_is_that_of_a_call_that_compiles_nothing():
  calls = []
  double = jax.jit(lambda x: 2 * x)

  def call():
    calls.append(None)
    return float(double(jnp.float32(3.0)))

  result, seconds = timing.warm(call)
  assert result == 6.0
  assert seconds > 0
  assert len(calls) == 2


def test_what_compiles_in_every_call_comes_to_an_end():
  sizes = []

  def call():
    sizes.append(len(sizes) + 1)
    # Another shape each time.
    return float(jax.jit(jnp.sum)(jnp.ones(sizes[-1])))

  result, _ = timing.warm(call)
  assert 2 < len(sizes) < 10
  assert result == sizes[-1]
