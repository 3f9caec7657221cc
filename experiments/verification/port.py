"""A case and our model for it."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Hashable
import functools
from typing import Any
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.verification import cases
from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.interop import wenet
from u2moe_jax.layers import subsampling
from u2moe_jax.models import u2
from u2moe_jax.training import objective

_T = TypeVar('_T')


class Port:
  """A case, our model with its weights, and what was computed so far.

  Attributes:
    case: inputs and expected outputs.
  """

  def __init__(self, case: cases.Case):
    self.case = case
    self._known: dict[Hashable, Any] = {}

  def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
    """Computes something the first time it is asked for."""
    # Nearly all of the time is compilation, and many quantities share a pass.
    if key not in self._known:
      self._known[key] = compute()
    return self._known[key]

  @functools.cached_property
  def yaml_config(self) -> config_lib.ModelConfig:
    """The model that the yaml describes, decoders included."""
    return self._config(names=None)

  @functools.cached_property
  def config(self) -> config_lib.ModelConfig:
    """The same, without decoders where the weights have none."""
    return self._config(names=self.case.weights)

  def _config(self, *, names: Collection[str] | None) -> config_lib.ModelConfig:
    """With the options that reproduce what the reference does differently."""
    settings = self.case.settings
    if 'wenet_config' not in settings:
      raise cases.CaseError(f'{self.case.folder}: no wenet_config')
    return wenet.model_config(
      settings['wenet_config'],
      sos=settings.get('sos', -1),
      eos=settings.get('eos', -1),
      reference_quirks=True,
      names=names,
    )

  @functools.cached_property
  def train_config(self) -> config_lib.TrainConfig:
    """The loss weights of the yaml (defaults are the reference's)."""
    conf = self.case.settings['wenet_config'].get('model_conf', {})
    return config_lib.TrainConfig(
      ctc_weight=conf.get('ctc_weight', 0.5),
      reverse_weight=conf.get('reverse_weight', 0.0),
      label_smoothing=conf.get('lsm_weight', 0.0),
      length_normalized=conf.get('length_normalized_loss', False),
    )

  @functools.cached_property
  def model(self) -> u2.U2MoeModel:
    return u2.U2MoeModel(self.config)

  @functools.cached_property
  def variables(self) -> tuple[PyTree, PyTree]:
    """Parameters and buffers."""
    mapped = wenet.model_variables(self.case.weights, self.config)
    # Once: NumPy arrays would be copied to the device by every call.
    return jax.tree.map(jnp.asarray, mapped)

  @property
  def params(self) -> PyTree:
    return self.variables[0]

  @property
  def buffers(self) -> PyTree:
    return self.variables[1]

  @property
  def geometry(self) -> subsampling.Geometry:
    return subsampling.geometry(self.config.encoder.subsampling)

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """Encoder frames of each utterance."""
    frames = self.case.arrays['feats_lengths'].astype(np.int32)
    return self.geometry.output_length(frames)

  @functools.cached_property
  def batch(self) -> objective.Batch:
    """The utterances with their labels."""
    arrays = self.case.arrays
    count = len(arrays['feats_lengths'])
    return objective.Batch(
      features=jnp.asarray(arrays['feats']),
      feature_lengths=jnp.asarray(arrays['feats_lengths'], jnp.int32),
      labels=jnp.asarray(arrays['target'], jnp.int32),
      label_lengths=jnp.asarray(arrays['target_lengths'], jnp.int32),
      # No row is empty.
      weights=jnp.ones((count,), jnp.float32),
    )

  def chunk(self, size: int, left: int) -> tuple[int, int]:
    """The mask that (size, left) gives in the reference.

    A model without dynamic chunks ignores the request: it has its static
    chunk, or none.
    """
    encoder = self.config.encoder
    if encoder.use_dynamic_chunk:
      return size, left
    return encoder.static_chunk_size or -1, left
