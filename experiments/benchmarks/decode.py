"""Whole utterances and streams, random weights."""

from collections.abc import Iterator
import functools
import itertools
import time
from typing import Any

import numpy as np

from experiments.benchmarks import harness
from experiments.benchmarks import operations
from u2moe_jax import config as config_lib
from u2moe_jax.decoding import batching
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import sessions


def _recognizer(
  model: harness.RandomModel, decode: config_lib.DecodeConfig
) -> recognizer_lib.Recognizer:
  return recognizer_lib.Recognizer(
    model.description, model.params, model.buffers, config=decode
  )


# Of speech: the cost of rescoring goes with them.
_TOKENS_PER_SECOND = 4.1


def _noise(seconds: float, rate: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.normal(0, 0.1, int(seconds * rate)).astype(np.float32)


def run(
  options: harness.Options, *, mode: config_lib.DecodingMode
) -> Iterator[dict[str, Any]]:
  """Offline decoding of equal utterances, full context."""
  settings = config_lib.DecodeConfig(mode=mode, batch_seconds=1e6)
  for name in options.configs:
    # Nothing holds a model while the next one is made.
    yield from _whole(harness.random_model(name, options), settings, options)


def _whole(
  model: harness.RandomModel,
  settings: config_lib.DecodeConfig,
  options: harness.Options,
) -> Iterator[dict[str, Any]]:
  recognizer = _recognizer(model, settings)
  rate = recognizer.description.features.sample_rate
  for seconds, batch in itertools.product(options.seconds, options.batches):
    features = recognizer.features(_noise(seconds, rate))
    # Padded to the batch as it is: a benchmark should not time padding.
    padded = batching.PaddedBatch(
      indices=tuple(range(batch)),
      features=np.stack([features] * batch),
      lengths=np.full((batch,), len(features), np.int32),
    )
    is_greedy = settings.mode == 'ctc_greedy_search'
    found = {}
    if not is_greedy:
      wanted = round(_TOKENS_PER_SECOND * seconds)
      num_tokens = _set_blank(recognizer, padded, wanted)
      found['case'] = f'{num_tokens} tokens'
    walls = harness.measure(
      functools.partial(recognizer.search, padded), options.repeats
    )
    config = recognizer.description.model
    num_frames = operations.num_frames(config, len(features))
    record = {
      'bench': 'greedy' if is_greedy else 'rescore',
      **found,
      **model.record,
      'batch': batch,
      'audio_s': seconds,
      'tokens': batch * num_frames,
      **walls,
      **_speed(walls['wall_s'], seconds, batch),
    }
    if is_greedy:
      # Of rescoring it hangs on the texts.
      done = operations.encode(config, batch=batch, num_inputs=len(features))
      record |= operations.record(
        done, walls['wall_s'], dtype=model.record['dtype']
      )
    yield record


def _set_blank(
  recognizer: recognizer_lib.Recognizer,
  padded: batching.PaddedBatch,
  num_tokens: int,
) -> int:
  """Makes the blank as likely as in speech.

  Random weights find a token in nearly every frame.

  Args:
    recognizer: whose CTC bias of the blank is changed.
    padded: equal utterances.
    num_tokens: that the CTC best path of each should have.

  Returns:
    How many it has.
  """
  blank_id = recognizer.description.model.blank_id
  log_probs = np.array(recognizer.encode(padded).log_probs[0])  # [T, V]
  blank = log_probs[:, blank_id].copy()
  # The best other token of each frame, and how far the blank lies before it.
  log_probs[:, blank_id] = -np.inf
  ids, lead = log_probs.argmax(axis=1), blank - log_probs.max(axis=1)

  def count(shift: float) -> int:
    path = np.where(lead + shift > 0, blank_id, ids)
    # A token begins where the frame differs from the one before.
    starts = path != np.concatenate([[blank_id], path[:-1]])
    return int(np.sum(starts & (path != blank_id)))

  # The count changes only where a frame's blank just wins: these are all the
  # shifts worth trying.
  shift = min(-lead, key=lambda shift: abs(count(shift) - num_tokens))
  bias = recognizer.params['ctc']['bias']
  # New dictionaries: other recognisers share the old ones.
  ctc = recognizer.params['ctc'] | {'bias': bias.at[blank_id].add(shift)}
  recognizer.params = recognizer.params | {'ctc': ctc}
  return count(shift)


def _speed(wall_s: float, seconds: float, batch: int) -> dict[str, float]:
  return {
    'rtf': round(wall_s / (seconds * batch), 5),
    'utt_per_s': round(batch / wall_s, 2),
  }


def _stream(
  recognizer: recognizer_lib.Recognizer,
  samples: np.ndarray,
  batch: int,
  runs: list[list[float]],
) -> int:
  """Streams once, side by side, in pieces of a tenth of a second.

  Args:
    recognizer: with a config that streams.
    samples: what all of them hear.
    batch: streams.
    runs: gets the milliseconds of every step that had a chunk.

  Returns:
    Segments, which are of no interest.
  """
  step_ms: list[float] = []
  runs.append(step_ms)
  pool = sessions.Sessions(recognizer, slots=batch, endpoints=False)
  streams = [pool.open() for _ in range(batch)]
  size = recognizer.description.features.sample_rate // 10
  for start in range(0, len(samples), size):
    begun = time.perf_counter()
    for stream in streams:
      stream.feed(samples[start : start + size])
    # Pieces that fill no chunk are no step.
    if pool.step():
      step_ms.append(1000 * (time.perf_counter() - begun))
  return sum(len(stream.finish()) for stream in streams)


def stream(options: harness.Options) -> Iterator[dict[str, Any]]:
  """Streams in one batch, chunk 16, 4 chunks of left context."""
  settings = config_lib.DecodeConfig(
    mode='ctc_prefix_beam_search', chunk_size=16, left_chunks=4
  )
  for name in options.configs:
    yield from _streams(harness.random_model(name, options), settings, options)


def _streams(
  model: harness.RandomModel,
  settings: config_lib.DecodeConfig,
  options: harness.Options,
) -> Iterator[dict[str, Any]]:
  recognizer = _recognizer(model, settings)
  rate = recognizer.description.features.sample_rate
  for seconds, batch in itertools.product(options.seconds, options.batches):
    samples = _noise(seconds, rate)
    runs: list[list[float]] = []
    walls = harness.measure(
      functools.partial(_stream, recognizer, samples, batch, runs),
      options.repeats,
    )
    # Without the warm calls, of which the first compiles.
    step_ms = list(itertools.chain(*runs[-options.repeats :]))
    yield {
      'bench': 'stream',
      **model.record,
      'batch': batch,
      'audio_s': seconds,
      'tokens': batch * settings.chunk_size,
      **walls,
      **_speed(walls['wall_s'], seconds, batch),
      'chunk_ms_p50': round(float(np.percentile(step_ms, 50)), 2),
      'chunk_ms_p95': round(float(np.percentile(step_ms, 95)), 2),
    }
