"""The rescoring stage alone: 10 hypotheses of about 41 tokens, 10 s of sound."""

from collections.abc import Iterator
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import harness
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import tree_rescoring
from u2moe_jax.layers import subsampling

_HYPOTHESES, _TOKENS, _ROOM = 10, 41, 64
# Places in which a hypothesis differs from the first one. A beam search gives
# lists of the first kind; with the other there is nothing to share.
_CASES = {'alike': 3, 'unrelated': _TOKENS}


def _nbest(batch: int, vocab_size: int, changes: int) -> hypotheses.Hypotheses:
  rng = np.random.default_rng(0)
  shape = (batch, _HYPOTHESES, _TOKENS)
  # Ids below 3 are special tokens.
  other = rng.integers(3, vocab_size - 1, shape)  # [B, N, U]
  tokens = np.broadcast_to(other[:, :1], shape).copy()
  order = rng.permuted(np.broadcast_to(np.arange(_TOKENS), shape), axis=-1)
  # The first places of a random order: exactly `changes` in each hypothesis.
  changed = order < changes
  # The first one is what the others are changed from.
  changed[:, 0] = False
  tokens[changed] = other[changed]
  padded = np.full((batch, _HYPOTHESES, _ROOM), -1, np.int32)
  padded[..., :_TOKENS] = tokens
  scores = -np.arange(_HYPOTHESES, dtype=np.float32)
  return hypotheses.Hypotheses(
    tokens=jnp.asarray(padded),
    lengths=jnp.full(shape[:2], _TOKENS, jnp.int32),
    scores=jnp.tile(jnp.asarray(scores), (batch, 1)),
    times=jnp.asarray(padded),
    margin=jnp.full((batch,), jnp.inf),
  )


def run(options: harness.Options) -> Iterator[dict[str, Any]]:
  """Wall and processor seconds of both decoders over an n-best list."""
  for name, seconds, batch in options.cases():
    model = harness.random_model(name, options)
    config = model.description.model
    geometry = subsampling.geometry(config.encoder.subsampling)
    # 100 steps of 10 ms a second; windows of 25 ms leave two of them out.
    num_frames = geometry.output_length(int(100 * seconds) - 2)
    shape = (batch, num_frames, config.encoder.model_dim)
    frames = jax.random.normal(jax.random.key(0), shape)
    mask = jnp.ones(shape[:2], bool)
    for case, changes in _CASES.items():
      rescore = functools.partial(
        tree_rescoring.search_rescoring,
        model.module,
        model.params,
        _nbest(batch, config.vocab_size, changes),
        frames,
        mask,
        ctc_weight=0.3,
        reverse_weight=0.5,
      )
      walls = harness.measure(rescore, options.repeats)
      begun = time.process_time()
      jax.block_until_ready(rescore())
      yield {
        'bench': 'rescoring',
        'case': case,
        **model.record,
        'batch': batch,
        'audio_s': seconds,
        **walls,
        'cpu_s': round(time.process_time() - begun, 4),
      }
