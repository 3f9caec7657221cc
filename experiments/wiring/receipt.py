"""Whether two models give the same answers to a few utterances."""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
import numpy as np

from data_pipelines import sources
from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import directory
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import fbank
from u2moe_jax.layers import subsampling
from u2moe_jax.models import u2
from u2moe_jax.ops import ctc
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.training import objective

# Rounding measured 4e-7 and 1.1e-5 at most (docs/upcycling.md).
ENCODER_BOUND = 1e-5  # of the largest magnitude
LOG_PROB_BOUND = 1e-4
_FRAMES = (160, 121, 83, 47)  # of made-up utterances; padding has its part
_TOKENS = 12  # that the decoders are fed


@dataclasses.dataclass(frozen=True)
class Probe:
  """What both models are asked.

  Attributes:
    features: log-mel frames, padded.
    lengths: real frames.
    tokens: inputs of the decoders; any will do.
    origin: where the features come from.
  """

  features: Float[np.ndarray, 'B T F']
  lengths: Int[np.ndarray, 'B']
  tokens: Int[np.ndarray, 'B U1']
  origin: str


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a model says, on the host.

  Attributes:
    frames: encoder output.
    mask: real encoder frames.
    log_probs: by head: `ctc`, and `forward` and `backward` where there are.
    texts: ids of the CTC best path of each utterance.
    visited: experts that a frame or a token visited, of all layers.
    experts: how many there are.
  """

  frames: Float[np.ndarray, 'B T D']
  mask: Bool[np.ndarray, 'B T']
  log_probs: Mapping[str, np.ndarray]
  texts: tuple[tuple[int, ...], ...]
  visited: int
  experts: int


@dataclasses.dataclass(frozen=True)
class Receipt:
  """How far apart two answers are.

  Attributes:
    utterances: how many there were.
    encoder_difference: largest of a real frame, relative to the largest
      magnitude there is.
    log_prob_difference: largest of any head.
    texts_equal: utterances whose greedy text is the same.
    text_tokens: tokens of the first model's texts, all together; of none that
      they are equal says little.
    experts_visited: experts of the second model that had a part in this.
    experts: how many it has, in all layers.
  """

  utterances: int
  encoder_difference: float
  log_prob_difference: float
  texts_equal: int
  text_tokens: int
  experts_visited: int
  experts: int

  @property
  def is_within_bounds(self) -> bool:
    """Whether this is rounding; numbers that are none are not."""
    return (
      self.encoder_difference <= ENCODER_BOUND
      and self.log_prob_difference <= LOG_PROB_BOUND
      and self.texts_equal == self.utterances
    )

  def lines(self, *, bounded: bool) -> list[str]:
    """The table for people; bounds only where they count."""
    bounds = [''] * 2
    if bounded:
      bounds = [f'  (bound {b:.0e})' for b in (ENCODER_BOUND, LOG_PROB_BOUND)]
    lines = [
      f'  encoder output  at most {self.encoder_difference:.2e} of its largest '
      f'magnitude{bounds[0]}',
      f'  log-probs       at most {self.log_prob_difference:.2e}{bounds[1]}',
      f'  greedy text     {self.texts_equal} of {self.utterances} equal '
      f'({self.text_tokens} tokens)',
    ]
    if self.experts:
      lines.append(
        f'  experts         {self.experts_visited} of {self.experts} visited'
      )
    return lines


def synthetic_probe(
  model: config_lib.ModelConfig,
  buffers: PyTree,
  *,
  num_utterances: int,
  seed: int = 0,
) -> Probe:
  """Random features, distributed as those of the training corpus."""
  rng = np.random.default_rng(seed)
  cmvn = {k: np.asarray(v, np.float32) for k, v in buffers['cmvn'].items()}
  features = [
    (
      # The model takes the mean off and multiplies by istd; this undoes both.
      cmvn['mean'][None]
      + rng.normal(size=(_FRAMES[i % len(_FRAMES)], model.feature_dim))
      / cmvn['istd'][None]
    ).astype(np.float32)
    for i in range(num_utterances)
  ]
  return _pad(features, model, 'random features', rng)


def manifest_probe(
  manifest: str,
  description: directory.Description,
  *,
  num_utterances: int,
  seed: int = 0,
) -> Probe:
  """The first usable utterances of a source.

  Raises:
    ValueError: if it cannot be opened, or has no usable sound.
  """
  rate = description.features.sample_rate
  source = sources.open_source(manifest, split='test', sample_rate=rate)
  kept = []
  # Lazily, so no more sound is read than is needed.
  for features in _features(source, description):
    kept.append(features)
    if len(kept) == num_utterances:
      break
  if not kept:
    raise ValueError(f'{manifest}: no utterance has usable sound')
  rng = np.random.default_rng(seed)
  return _pad(kept, description.model, manifest, rng)


def _features(
  source: sources.Source, description: directory.Description
) -> Iterator[np.ndarray]:
  kind = description.model.encoder.subsampling
  # Less sound has no encoder frame to compare.
  shortest = subsampling.geometry(kind).window(1)
  for index in range(len(source)):
    try:
      samples = source.load(index)
    except audio.AudioError:
      continue
    features = fbank.fbank(samples, description.features)
    if len(features) >= shortest:
      yield features


def _pad(
  features: list[np.ndarray],
  model: config_lib.ModelConfig,
  origin: str,
  rng: np.random.Generator,
) -> Probe:
  lengths = np.array([len(each) for each in features], np.int32)
  padded = np.zeros((len(features), max(lengths), model.feature_dim))
  for row, each in zip(padded, features, strict=True):
    row[: len(each)] = each
  # Decoders can be asked about any text, and both models are asked the same.
  tokens = rng.integers(0, model.vocab_size, (len(features), _TOKENS))
  tokens[:, 0] = model.sos
  return Probe(
    features=padded.astype(np.float32),
    lengths=lengths,
    tokens=tokens.astype(np.int32),
    origin=origin,
  )


def ask(
  model: config_lib.ModelConfig,
  params: PyTree,
  buffers: PyTree,
  probe: Probe,
  mesh: jax.sharding.Mesh | None = None,
) -> Answer:
  """Runs a model, in float32 where it computes in less.

  Args:
    model: its config.
    params: its parameters, placed.
    buffers: its buffers, placed.
    probe: what it is asked.
    mesh: where it is placed; None for one device. Tokens travel to the
      experts, so that no device holds those of others.
  """
  # Its rounding alone is larger than the bounds.
  if model.dtype == 'bfloat16':
    model = dataclasses.replace(model, dtype='float32')
  inputs = (probe.features, probe.lengths, probe.tokens)
  count = len(probe.lengths)
  in_force = contextlib.nullcontext()
  if mesh is not None:
    in_force = jax.set_mesh(mesh)
    # Devices share the utterances; empty ones fill the last parts.
    more = -count % placement.batch_parts(mesh, rules.STANDARD)
    inputs = jax.tree.map(
      lambda x: np.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)), inputs
    )
  with in_force:
    found = jax.device_get(
      _pass(u2.U2MoeModel(model), params, buffers, *inputs)
    )
  # [:count]: all but loads are by utterance.
  loads = found.pop('loads').values()
  found = jax.tree.map(lambda x: x[:count], found)
  texts = tuple(
    tuple(row[:length].tolist())
    for row, length in zip(found['tokens'], found['lengths'], strict=True)
  )
  return Answer(
    frames=found['frames'],
    mask=found['mask'],
    log_probs=found['log_probs'],
    texts=texts,
    # A load is the share of each expert of each block: [L, E].
    visited=sum(int(np.count_nonzero(load)) for load in loads),
    experts=sum(load.size for load in loads),
  )


@functools.partial(jax.jit, static_argnums=0)
def _pass(
  model: u2.U2MoeModel,
  params: PyTree,
  buffers: PyTree,
  features: jax.Array,
  lengths: jax.Array,
  tokens: jax.Array,
) -> dict[str, Any]:
  real = (lengths > 0)[:, None]
  inputs = u2.DecoderInputs(
    tokens=tokens, mask=jnp.broadcast_to(real, tokens.shape)
  )
  # The same tokens for both decoders; not reversed, as nobody reads them.
  with nn.logical_axis_rules(rules.STANDARD):  # they say nothing without a mesh
    outputs = model.apply(
      {'params': params}, features, lengths, buffers, inputs, inputs
    )
  log_probs = {'ctc': outputs.ctc_log_probs}
  heads = {'forward': outputs.forward, 'backward': outputs.backward}
  for name, scores in heads.items():
    if scores is not None:
      log_probs[name] = jax.nn.log_softmax(scores.logits)
  mask = outputs.encoder.mask
  # The greedy text needs no search whose beam could hide a difference.
  best = jnp.argmax(outputs.ctc_log_probs, axis=-1)
  collapsed, counts, _ = ctc.collapse(  # [B, T], [B]
    best, mask, blank_id=model.config.blank_id
  )
  return {
    'frames': outputs.encoder.frames,
    'mask': mask,
    'log_probs': log_probs,
    'tokens': collapsed,
    'lengths': counts,
    'loads': {
      name: stats.summary.load
      for name, stats in objective.moe_layers(outputs).items()
    },
  }


def compare(before: Answer, after: Answer) -> Receipt:
  """Compares answers to the same probe; padding does not count."""
  mask = before.mask
  # What stands in padded frames is nobody's answer.
  expected = before.frames[mask]  # [frames, D]
  scale = np.max(np.abs(expected), initial=0.0) or 1.0
  differences = {
    head: np.abs(log_probs - after.log_probs[head])
    for head, log_probs in before.log_probs.items()
  }
  # Frames have padding; the decoders' tokens have none.
  differences['ctc'] = differences['ctc'][mask]  # [frames, V]
  return Receipt(
    utterances=len(before.texts),
    encoder_difference=float(
      np.max(np.abs(expected - after.frames[mask]), initial=0.0) / scale
    ),
    log_prob_difference=float(
      np.max([np.max(each, initial=0.0) for each in differences.values()])
    ),
    texts_equal=sum(
      a == b for a, b in zip(before.texts, after.texts, strict=True)
    ),
    text_tokens=sum(map(len, before.texts)),
    experts_visited=after.visited,
    experts=after.experts,
  )
