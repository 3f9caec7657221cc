"""Test session: 8 CPU devices, strict shapes, parsed flags."""

import os
import pathlib

# Read when functions are decorated, so before anything of ours is imported.
os.environ.setdefault('U2MOE_TYPECHECK', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tests compile much and run little.
os.environ['XLA_FLAGS'] = (
  f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0'
)

from absl import flags
import jax
import pytest

# 2 x 2 x 2: three mesh axes can split something at once.
jax.config.update('jax_num_cpu_devices', 8)
# (T,) with (B, T) is mostly an axis forgotten; so every new one is written.
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_configure():
  """Marks absl flags as parsed, so that library code may read them."""
  flags.FLAGS.mark_as_parsed()


# Linux lets a process have 65,530 mappings; each compiled function takes some,
# and LLVM aborts when there are none left.
_MOST_MAPPINGS = 25_000


def _num_mappings() -> int:
  """Memory mappings of this process; 0 where nobody tells."""
  maps = pathlib.Path('/proc/self/maps')
  return maps.read_text().count('\n') if maps.exists() else 0


@pytest.fixture(autouse=True)
def _programs_are_forgotten():
  """Drops compiled programs before there are too many for one process."""
  yield
  # Far below the limit: a single test may compile a lot.
  if _num_mappings() > _MOST_MAPPINGS:
    jax.clear_caches()
