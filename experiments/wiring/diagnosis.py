"""What `doctor` looks at."""

from collections.abc import Callable
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time

import jax
import jax.numpy as jnp

# Names of distributions, as pip has them.
_CORE = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'chex',
  'numpy',
  'scipy',
  'tensorflow-datasets',
  'array_record',
  'grain',
  'librosa',
  'soundfile',
  'soxr',
  'sentencepiece',
  'jiwer',
)
_OPTIONAL = {
  'matplotlib': 'plots and the report',
  'espeakng-loader': 'the built-in spoken corpus',
  'beartype': 'shape checks in tests',
}


def report() -> bool:
  """Prints versions, devices and memory; False if a core package lacks."""
  print(f'python {platform.python_version()} on {platform.platform()}')
  healthy = True
  for name in _CORE:
    version = _version(name)
    healthy &= version is not None
    print(
      f'  {name:20} {version or "MISSING: pip install -r requirements.txt"}'
    )
  for name, purpose in _OPTIONAL.items():
    print(f'  {name:20} {_version(name) or f"not installed ({purpose})"}')
  for device in jax.devices():
    print(
      f'device {device.id}: {device.device_kind} ({device.platform})'
      f'{_device_memory(device)}'
    )
  print(
    f'cores {len(os.sched_getaffinity(0))}, memory {_memory()}, '
    f'free disk {shutil.disk_usage(".").free / 2**30:.0f} GiB'
  )
  return healthy


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _device_memory(device: jax.Device) -> str:
  stats = device.memory_stats() or {}
  limit = stats.get('bytes_limit')
  return f', {limit / 2**30:.0f} GiB' if limit else ''


def _memory() -> str:
  pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return f'{pages / 2**30:.0f} GiB'


def smoke() -> bool:
  """Runs the smallest forms of the main parts; says which work."""
  checks: dict[str, Callable[[], str]] = {
    'matrix product': _matrix_product,
    'train and decode': _train_and_decode,
  }
  healthy = True
  for name, check in checks.items():
    begun = time.monotonic()
    try:
      told = check()
    except Exception as error:  # whatever it is, say it and go on
      healthy, told = False, f'FAILED: {type(error).__name__}: {error}'
    print(f'{name}: {told} ({time.monotonic() - begun:.1f} s)')
  return healthy


def _matrix_product() -> str:
  size = 1024
  x = jnp.ones((size, size))
  multiply = jax.jit(lambda x: x @ x)
  # Compiles; the calls that count come after it.
  multiply(x).block_until_ready()
  begun = time.perf_counter()
  for _ in range(5):
    multiply(x).block_until_ready()
  seconds = (time.perf_counter() - begun) / 5
  # A multiply-add counts as two operations.
  return f'{2 * size**3 / seconds / 1e9:.0f} GFLOP/s, float32'


def _train_and_decode() -> str:
  from data_pipelines import sources
  from data_pipelines import synthetic
  from experiments.configs import tiny
  from experiments.wiring import decoding
  from experiments.wiring import training
  from u2moe_jax import config as config_lib
  from u2moe_jax.decoding import recognizer

  # Eight utterances of tones and four steps: every part is used, none is good.
  with tempfile.TemporaryDirectory() as folder:
    manifest = synthetic.write_corpus(folder, num_utterances=8, seed=0)
    config = config_lib.from_dict(
      config_lib.Config, tiny.get_config().to_dict()
    )
    config = config_lib.replace(config, 'data.train', str(manifest))
    training.train(config, f'{folder}/work')
    model = recognizer.Recognizer.from_checkpoint(
      f'{folder}/work',
      config=config_lib.DecodeConfig(mode='ctc_greedy_search'),
    )
    source = sources.open_source(str(manifest))
    summary, _ = decoding.run(model, source)
  return f'works, {summary.utterances} utterances decoded'
