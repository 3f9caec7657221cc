"""Gradients and their norms, under the reference's parameter names."""

from collections.abc import Iterator
from collections.abc import Mapping

import numpy as np

from experiments.verification import compare
from experiments.verification import decoders_and_losses
from experiments.verification import port as port_lib
from experiments.verification import registry
from u2moe_jax.array_types import PyTree
from u2moe_jax.interop import wenet

_RELATIVE = 1e-4  # of a gradient's own norm
_NOISE = 1e-5  # of the total norm; below it a gradient is rounding noise


def by_name(port: port_lib.Port, gradients: PyTree) -> Mapping[str, np.ndarray]:
  """Our gradients in the reference's names and layouts.

  What stands in the checkpoint but takes part in nothing gets 0.
  """
  weights = port.case.weights
  unused = {name: np.zeros_like(value) for name, value in weights.items()}
  return unused | wenet.state_dict(
    gradients,
    None,
    port.config,
    # Only the reference's two-sided decoder has that level in its names.
    left_decoder=any('.left_decoder.' in name for name in weights),
  )


def _full_context(port: port_lib.Port) -> Mapping[str, np.ndarray]:
  return port.once(
    'gradients',
    lambda: by_name(port, decoders_and_losses.run_objective(port)[1]),
  )


def total_norm(gradients: Mapping[str, np.ndarray]) -> float:
  """Euclidean norm of everything."""
  squares = [np.sum(np.square(value)) for value in gradients.values()]
  return float(np.sqrt(np.sum(squares)))


def tolerance(norm: float, total: float) -> float:
  """Largest difference, from the norms the reference has."""
  # Some gradients are zero but for rounding, the bias of a key for one:
  # relative to themselves they never fit.
  return _RELATIVE * max(norm, _NOISE * total)


def _expected_total(port: port_lib.Port) -> float:
  # A case without it is judged by our own total.
  known = port.case.results.get('grad_norm_total')
  return total_norm(_full_context(port)) if known is None else known


def _gradient(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  name = quantity.text('name')
  limit = tolerance(
    float(np.linalg.norm(quantity.value)), _expected_total(port)
  )
  ours = _named(port, name)
  yield compare.close(quantity.path, ours, quantity.value, limit)


def _norm(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  limit = tolerance(quantity.value, _expected_total(port))
  ours = np.linalg.norm(_named(port, quantity.text('name')))
  yield compare.close(quantity.path, ours, quantity.value, limit)


def _named(port: port_lib.Port, name: str) -> np.ndarray:
  gradients = _full_context(port)
  if name not in gradients:
    raise ValueError(f'no parameter {name!r}')
  return gradients[name]


def _total(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  ours = total_norm(_full_context(port))
  limit = tolerance(quantity.value, quantity.value)
  yield compare.close(quantity.path, ours, quantity.value, limit)


RULES = (
  registry.Rule(r'io/grad\.(?P<name>.+)', _gradient),
  registry.Rule(r'results/grad_norm/(?P<name>.+)', _norm),
  registry.Rule('results/grad_norm_total', _total),
)
