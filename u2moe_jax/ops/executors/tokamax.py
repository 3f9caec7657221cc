"""As `ragged`, by the kernels of tokamax where it has one for the device.

An optional extra (`requirements-tokamax.txt`), for Python 3.12 and later;
where tokamax has no kernel it falls back to XLA's own expansion.
"""

import importlib

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops.dropout import ExpertDropout
from u2moe_jax.ops.executors import ragged
from u2moe_jax.ops.routing import Routing


def run(
  x: Float[Array, 'S D'],
  plan: Routing,
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
  options: grouped_matmul.Options,
  dropout: ExpertDropout | None,
) -> grouped_matmul.Execution:
  """Multiplies sorted rows by `tokamax.ragged_dot`.

  Raises:
    config_lib.ConfigError: if tokamax is not installed.
  """
  try:
    tokamax = importlib.import_module('tokamax')
  except ImportError:
    raise config_lib.ConfigError(
      'moe.executor=tokamax needs the package tokamax (Python 3.12 or later): '
      'pip install -r requirements-tokamax.txt, or set moe.executor=auto'
    ) from None
  return ragged.run_sorted(
    x, plan, weights, options, dropout, tokamax.ragged_dot
  )
