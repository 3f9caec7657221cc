"""Whole utterances and streams, random weights."""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import harness
from experiments.benchmarks import operations
from u2moe_jax import config as config_lib
from u2moe_jax.decoding import batching
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import prefix_tree
from u2moe_jax.decoding import programs
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import sessions
from u2moe_jax.decoding import tree_rescoring


def _recognizer(
  model: harness.RandomModel, decode: config_lib.DecodeConfig
) -> recognizer_lib.Recognizer:
  return recognizer_lib.Recognizer(
    model.description, model.params, model.buffers, config=decode
  )


# Of speech: the cost of rescoring goes with them.
_TOKENS_PER_SECOND = 4.1
# Between what is added to the logit of the blank, and how often it is halved.
_WIDEST_SHIFT, _HALVINGS = 32.0, 24


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
      found['case'] = _set_blank(recognizer, padded, wanted)
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
) -> str:
  """Makes the blank so likely that the texts found are as long as in speech.

  Random weights find a token in nearly every frame, and a search that adds up
  alignments finds more of them than the best path has.

  Args:
    recognizer: whose CTC bias of the blank is changed.
    padded: equal utterances.
    num_tokens: that the text of each should have.

  Returns:
    How long it is, and how many nodes the trees of its n-best list have,
    left-to-right and right-to-left: what rescoring costs goes with them.
  """
  blank_id = recognizer.description.model.blank_id
  encoded = recognizer.encode(padded)

  def search(shift: float) -> hypotheses.Hypotheses:
    shifted = encoded.log_probs.at[..., blank_id].add(shift)
    return programs.search_prefixes(
      dataclasses.replace(encoded, log_probs=jax.nn.log_softmax(shifted)),
      beam=recognizer.config.beam,
      blank_id=blank_id,
    )

  # The likelier the blank, the shorter the text: halved until one fits.
  low, high = -_WIDEST_SHIFT, _WIDEST_SHIFT
  for _ in range(_HALVINGS):
    shift = (low + high) / 2
    found = search(shift)
    length = int(found.lengths[0, 0])
    if length == num_tokens:
      break
    low, high = (shift, high) if length > num_tokens else (low, shift)
  bias = recognizer.params['ctc']['bias']
  # New dictionaries: other recognisers share the old ones.
  ctc = recognizer.params['ctc'] | {'bias': bias.at[blank_id].add(shift)}
  recognizer.params = recognizer.params | {'ctc': ctc}
  nodes = (_num_nodes(found, reverse=reverse) for reverse in (False, True))
  return f'{length} tokens, {" + ".join(map(str, nodes))} nodes'


def _num_nodes(found: hypotheses.Hypotheses, *, reverse: bool) -> int:
  """Nodes of the prefix tree of the first list, as a decoder reads it."""
  texts = tree_rescoring.read_order(found, reverse=reverse)
  return int(prefix_tree.prefix_nodes(texts.tokens, texts.lengths)[2][0])


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
    # What is left at the end, less than a chunk, is one more.
    num_chunks = len(runs[-1]) + 1
    done = num_chunks * operations.chunk(
      recognizer.description.model,
      batch=batch,
      chunk_size=settings.chunk_size,
      left_chunks=settings.left_chunks,
    )
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
      **operations.record(done, walls['wall_s'], dtype=model.record['dtype']),
    }
