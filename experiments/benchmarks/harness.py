"""What all benchmarks need: models with random parameters, warm timing."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import importlib
import itertools
import statistics
import time
import typing
from typing import Any
from typing import Literal
import zlib

from flax import linen as nn
from flax import traverse_util
import jax
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import directory
from u2moe_jax.models import inference
from u2moe_jax.models import u2
from u2moe_jax.ops import grouped_matmul

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
    form: of the parameters, where a task decodes.
    dtype: float32, bfloat16 or int8 (weights only); empty: the config's.
  """

  configs: tuple[str, ...]
  seconds: tuple[float, ...]
  batches: tuple[int, ...]
  repeats: int
  form: config_lib.Form = 'inference'
  dtype: str = ''

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
  # Without data there is no token table to take it from.
  if not model.vocab_size:
    model = dataclasses.replace(model, vocab_size=_VOCAB_SIZE)
  bins = config.data.features.num_mel_bins
  model = dataclasses.replace(model, feature_dim=bins)
  return dataclasses.replace(config, model=model)


@dataclasses.dataclass(frozen=True)
class RandomModel:
  """A model with random parameters.

  Attributes:
    description: the model, and the features of its config.
    params: its parameters.
    buffers: its buffers.
    record: what every record of it says.
  """

  description: directory.Description
  params: PyTree
  buffers: PyTree
  record: dict[str, Any]

  @property
  def module(self) -> u2.U2MoeModel:
    """What takes the parameters."""
    form = self.description.form
    return u2.U2MoeModel(self.description.model, form=form)


def random_model(name: str, options: Options) -> RandomModel:
  """Draws a model in the form and type that are asked for.

  Raises:
    config_lib.ConfigError: if there is no such experiment, or no such type in
      that form.
  """
  config = experiment(name)
  weights = options.dtype or config.model.dtype
  if options.form == 'training':
    model = with_dtype(config.model, weights)
    params, buffers = _init(model)
  else:
    kind = typing.cast(inference.Weights, weights)
    params, buffers = _draw_inference(config.model, kind)
    model = inference.model_config(config.model, kind)
  return RandomModel(
    directory.Description(model, config.data.features, form=options.form),
    params,
    buffers,
    {
      'config': name,
      'form': options.form,
      'dtype': weights,
      **experts(model, options.form),
      **model_size(model),
    },
  )


def experts(
  config: config_lib.ModelConfig, form: config_lib.Form
) -> dict[str, str]:
  """How experts are computed, and how their weights lie, where there are any."""
  moe = config.encoder.moe
  if not moe.num_experts:
    return {}
  return {
    'executor': grouped_matmul.choose(moe.executor, 1),
    'layout': 'separate' if form == 'inference' else 'stacked',
  }


def with_dtype(
  config: config_lib.ModelConfig, dtype: str
) -> config_lib.ModelConfig:
  """The model as it trains, computing in another type.

  Raises:
    config_lib.ConfigError: for int8.
  """
  if dtype == 'int8':
    raise config_lib.ConfigError(
      '--dtype=int8 is for decoding in the inference form: --form=inference'
    )
  kind = typing.cast(Literal['float32', 'bfloat16'], dtype or config.dtype)
  return dataclasses.replace(config, dtype=kind)


def _init(config: config_lib.ModelConfig) -> tuple[PyTree, PyTree]:
  model = u2.U2MoeModel(config)
  # The boxes name logical axes, which one device has no use for.
  init = jax.jit(lambda key: nn.meta.unbox(u2.init_params(model, key)))
  return init(jax.random.key(0)), u2.init_buffers(config)


def _draw_inference(
  config: config_lib.ModelConfig, weights: inference.Weights
) -> tuple[PyTree, PyTree]:
  """Converts arrays as they are drawn: the other form is never whole."""
  shapes = traverse_util.flatten_dict(
    directory.abstract_variables(config), sep='/'
  )
  buffers = traverse_util.flatten_dict(
    {'buffers': u2.init_buffers(config)}, sep='/'
  )
  bound = config.encoder.model_dim**-0.5

  def draw(path: str) -> np.ndarray:
    if path in buffers:
      return np.asarray(buffers[path])
    # Scales of 1 and biases of 0, so that activations keep their size.
    if 'norm' in path:
      return np.full(shapes[path].shape, 'scale' in path, np.float32)
    # By path: the same array whatever was drawn before, in every process.
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    # Uniform, in float32 and in place: there may be a billion of them.
    values = rng.random(shapes[path].shape, np.float32)
    values -= 0.5
    values *= 2 * bound
    return values

  arrays = inference.convert(config, draw, weights=weights)
  tree = inference.nest((path, jax.device_put(each)) for path, each in arrays)
  return tree['params'], tree['buffers']


def measure(function: Callable[[], Any], repeats: int) -> dict[str, float]:
  """Median, least and most wall seconds of a call, after two warm ones.

  `compile_s` is what the first call took longer than the median.
  """
  begun = time.perf_counter()
  jax.block_until_ready(function())
  first = time.perf_counter() - begun
  jax.block_until_ready(function())
  seconds = []
  for _ in range(repeats):
    begun = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - begun)
  median = statistics.median(seconds)
  return {
    'wall_s': round(median, 5),
    'wall_s_min': round(min(seconds), 5),
    'wall_s_max': round(max(seconds), 5),
    'compile_s': round(max(first - median, 0.0), 2),
  }


def model_size(config: config_lib.ModelConfig) -> dict[str, float]:
  """Parameters in millions, in all and per frame."""
  total, active = u2.count_params(config)
  return {
    'params_m': round(total / 1e6, 1),
    'active_params_m': round(active / 1e6, 1),
  }
