"""Test session: 8 CPU devices, strict shapes, parsed flags."""

import os

os.environ.setdefault('U2MOE_TYPECHECK', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import flags
import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_configure():
  """Marks absl flags as parsed, so that library code may read them."""
  flags.FLAGS.mark_as_parsed()
