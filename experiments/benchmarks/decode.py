"""Whole utterances and streams, random weights."""

from collections.abc import Iterator
import functools
import itertools
import time
from typing import Any

import numpy as np

from experiments.benchmarks import harness
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.decoding import batching
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import sessions


def _recognizer(
  name: str, decode: config_lib.DecodeConfig
) -> recognizer_lib.Recognizer:
  config = harness.experiment(name)
  _, params, buffers = harness.random_variables(config.model)
  description = directory.Description(config.model, config.data.features)
  return recognizer_lib.Recognizer(description, params, buffers, config=decode)


def _noise(seconds: float, rate: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.normal(0, 0.1, int(seconds * rate)).astype(np.float32)


def run(
  options: harness.Options, *, mode: config_lib.DecodingMode
) -> Iterator[dict[str, Any]]:
  """Offline decoding of equal utterances, full context."""
  for name, seconds, batch in options.cases():
    settings = config_lib.DecodeConfig(mode=mode, batch_seconds=1e6)
    recognizer = _recognizer(name, settings)
    rate = recognizer.description.features.sample_rate
    features = recognizer.features(_noise(seconds, rate))
    # Padded to the batch as it is: a benchmark should not time padding.
    padded = batching.PaddedBatch(
      indices=tuple(range(batch)),
      features=np.stack([features] * batch),
      lengths=np.full((batch,), len(features), np.int32),
    )
    walls = harness.measure(
      functools.partial(recognizer.search, padded), options.repeats
    )
    yield {
      'bench': 'greedy' if mode == 'ctc_greedy_search' else 'rescore',
      'config': name,
      'dtype': recognizer.description.model.dtype,
      'batch': batch,
      'audio_s': seconds,
      **walls,
      'rtf': round(walls['wall_s'] / (seconds * batch), 5),
      **harness.model_size(recognizer.description.model),
    }


def _stream(recognizer, samples, batch: int, step_ms: list[float]) -> int:
  """Streams once, side by side, in pieces of a tenth of a second."""
  step_ms.clear()
  pool = sessions.Sessions(recognizer, slots=batch, endpoints=False)
  streams = [pool.open() for _ in range(batch)]
  size = recognizer.description.features.sample_rate // 10
  for start in range(0, len(samples), size):
    begun = time.perf_counter()
    for stream in streams:
      stream.feed(samples[start : start + size])
    if pool.step():
      step_ms.append(1000 * (time.perf_counter() - begun))
  return sum(len(stream.finish()) for stream in streams)


def stream(options: harness.Options) -> Iterator[dict[str, Any]]:
  """Streams in one batch, chunk 16, 4 chunks of left context."""
  settings = config_lib.DecodeConfig(
    mode='ctc_prefix_beam_search', chunk_size=16, left_chunks=4
  )
  for name in options.configs:
    recognizer = _recognizer(name, settings)
    rate = recognizer.description.features.sample_rate
    for seconds, batch in itertools.product(options.seconds, options.batches):
      samples = _noise(seconds, rate)
      step_ms: list[float] = []

      walls = harness.measure(
        functools.partial(_stream, recognizer, samples, batch, step_ms),
        options.repeats,
      )
      yield {
        'bench': 'stream',
        'config': name,
        'dtype': recognizer.description.model.dtype,
        'batch': batch,
        'audio_s': seconds,
        **walls,
        'rtf': round(walls['wall_s'] / (seconds * batch), 5),
        'chunk_ms_p50': round(float(np.percentile(step_ms, 50)), 2),
        'chunk_ms_p95': round(float(np.percentile(step_ms, 95)), 2),
        **harness.model_size(recognizer.description.model),
      }
