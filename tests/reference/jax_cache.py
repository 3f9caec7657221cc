"""A compilation cache for some tests, and for no others."""

from collections.abc import Iterator
import contextlib
import os

import jax
from jax.experimental.compilation_cache import compilation_cache

_SETTINGS = {
  'jax_compilation_cache_dir': None,
  'jax_persistent_cache_min_compile_time_secs': 0.0,
}


@contextlib.contextmanager
def use(folder: str | os.PathLike[str]) -> Iterator[None]:
  """Keeps compiled programs in a folder; afterwards all is as it was."""
  # Other tests must not find programs that this one has left.
  before = {name: getattr(jax.config, name) for name in _SETTINGS}
  try:
    _set({**_SETTINGS, 'jax_compilation_cache_dir': str(folder)})
    yield
  finally:
    _set(before)


def _set(settings) -> None:
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # or it goes on with the old folder
