"""Activation functions by their config names."""

from collections.abc import Callable
import functools

import jax

from u2moe_jax.array_types import Array
from u2moe_jax.config import Activation

# One object per name: jitted code and custom gradients key on identity.
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'swish': jax.nn.silu,
  'relu': jax.nn.relu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
}


def get(name: Activation) -> Callable[[Array], Array]:
  """Returns the activation function of a config name."""
  return _ACTIVATIONS[name]
