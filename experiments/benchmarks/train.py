"""One training step on random batches."""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import harness
from experiments.benchmarks import operations
from u2moe_jax import config as config_lib
from u2moe_jax.models import u2
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.training import objective
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import state as state_lib
from u2moe_jax.training import step as step_lib

_TOKENS_PER_SECOND = 4


def random_batch(
  config: config_lib.ModelConfig, *, batch: int, seconds: float
) -> dict[str, np.ndarray]:
  """Host arrays of `objective.Batch`, all rows full."""
  rng = np.random.default_rng(0)
  frames, labels = _sizes(seconds)
  shape = (batch, frames, config.feature_dim)
  # Ids below 3 are special tokens.
  tokens = rng.integers(3, config.vocab_size, (batch, labels))
  return {
    'features': rng.normal(size=shape).astype(np.float32),
    'feature_lengths': np.full((batch,), frames, np.int32),
    'labels': tokens.astype(np.int32),
    'label_lengths': np.full((batch,), labels, np.int32),
    'weights': np.ones((batch,), np.float32),
  }


def _sizes(seconds: float) -> tuple[int, int]:
  """Input frames and labels of an utterance."""
  return int(seconds * 100), int(seconds * _TOKENS_PER_SECOND)


def run(options: harness.Options) -> Iterator[dict[str, Any]]:
  """Step time: forward, backward, optimizer; state donated."""
  for name, seconds, batch in options.cases():
    config = harness.experiment(name)
    model = harness.with_dtype(config.model, options.dtype)
    config = dataclasses.replace(config, model=model)
    walls = _measure(config, seconds, batch, options.repeats)
    sound = seconds * batch / walls['wall_s']
    frames, labels = _sizes(seconds)
    done = operations.train(
      model, batch=batch, num_inputs=frames, labels=labels
    )
    yield {
      'bench': 'train',
      'config': name,
      'form': 'training',
      'dtype': config.model.dtype,
      'batch': batch,
      'audio_s': seconds,
      **walls,
      'utt_per_s': round(batch / walls['wall_s'], 2),
      'tokens': batch * operations.num_frames(model, frames),
      **operations.record(done, walls['wall_s'], dtype=model.dtype),
      'audio_seconds_per_second': round(sound, 1),
      **harness.experts(model, 'training'),
      **harness.model_size(model),
    }


def _measure(
  config: config_lib.Config, seconds: float, batch: int, repeats: int
) -> dict[str, float]:
  mesh = mesh_lib.make_mesh(config.mesh)
  model = u2.U2MoeModel(config.model)
  optimizer = optimizer_lib.optimizer_of(config)
  buffers = u2.init_buffers(config.model)
  with jax.set_mesh(mesh):
    shardings = state_lib.state_shardings(model, optimizer, buffers, mesh=mesh)
    key = jax.random.key(0)
    state = state_lib.init_state(
      model, optimizer, buffers, key, shardings=shardings
    )
    train_step = step_lib.make_train_step(
      model, optimizer, config, shardings=shardings, mesh=mesh
    )
    arrays = random_batch(config.model, batch=batch, seconds=seconds)
    sharding = placement.batch_sharding(mesh, rules.STANDARD)
    placed = objective.Batch(**placement.shard_batch(arrays, sharding))

    def once():
      # The state is donated: each step must get what the last one returned.
      nonlocal state
      state, metrics = train_step(state, placed)
      return state, metrics

    return harness.measure(once, repeats)
