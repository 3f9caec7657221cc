"""Warm timing, and what every record says of the machine."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import importlib
import itertools
import os
import resource
import statistics
import time
from typing import Any

from flax import linen as nn
import jax

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.models import u2

# A vocabulary for configs that leave it to the data.
_VOCAB_SIZE = 5000


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure.

  Attributes:
    configs: names in experiments/configs.
    seconds: sound per utterance.
    batches: utterances per batch.
    repeats: timed calls.
  """

  configs: tuple[str, ...]
  seconds: tuple[float, ...]
  batches: tuple[int, ...]
  repeats: int

  def cases(self) -> Iterator[tuple[str, float, int]]:
    """Every (config name, seconds, batch)."""
    return itertools.product(self.configs, self.seconds, self.batches)


def experiment(name: str) -> config_lib.Config:
  """Resolves an experiment by name.

  Raises:
    config_lib.ConfigError: if there is none of that name.
  """
  try:
    module = importlib.import_module(f'experiments.configs.{name}')
  except ModuleNotFoundError:
    raise config_lib.ConfigError(
      f'no experiment {name!r} in experiments/configs'
    ) from None
  config = config_lib.from_dict(
    config_lib.Config, module.get_config().to_dict()
  )
  model = config.model
  if not model.vocab_size:
    model = dataclasses.replace(model, vocab_size=_VOCAB_SIZE)
  bins = config.data.features.num_mel_bins
  model = dataclasses.replace(model, feature_dim=bins)
  return dataclasses.replace(config, model=model)


def random_variables(
  config: config_lib.ModelConfig,
) -> tuple[u2.U2MoeModel, PyTree, PyTree]:
  """The model, random parameters and buffers."""
  model = u2.U2MoeModel(config)
  init = jax.jit(lambda key: nn.meta.unbox(u2.init_params(model, key)))
  return model, init(jax.random.key(0)), u2.init_buffers(config)


def measure(function: Callable[[], Any], repeats: int) -> dict[str, float]:
  """Median, least and most wall seconds of a call, after two warm ones."""
  for _ in range(2):
    jax.block_until_ready(function())
  seconds = []
  for _ in range(repeats):
    begun = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - begun)
  return {
    'wall_s': round(statistics.median(seconds), 5),
    'wall_s_min': round(min(seconds), 5),
    'wall_s_max': round(max(seconds), 5),
  }


def model_size(config: config_lib.ModelConfig) -> dict[str, float]:
  """Parameters in millions, in all and per frame."""
  total, active = u2.count_params(config)
  return {
    'params_m': round(total / 1e6, 1),
    'active_params_m': round(active / 1e6, 1),
  }


def with_machine(record: dict[str, Any]) -> dict[str, Any]:
  """Adds what the figure hangs on."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  return {
    'impl': 'u2moe_jax',
    **record,
    'threads': len(os.sched_getaffinity(0)),
    'device': jax.devices()[0].device_kind,
    'peak_rss_gib': round(peak, 2),
    'load_average': round(os.getloadavg()[0], 2),
  }
