"""The hybrid loss: CTC, two attention decoders, and router losses if asked.

loss = cw * ctc + (1 - cw) * ((1 - rw) * l2r + rw * r2l)
       + balance_loss_weight * balance + z_loss_weight * z

(U2++, arXiv 2106.05642, equations 1 and 2). Every part is divided by the
number of real utterances of the global batch.
"""

from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import Key
from u2moe_jax.array_types import PyTree
from u2moe_jax.layers import moe
from u2moe_jax.layers import subsampling
from u2moe_jax.models import u2
from u2moe_jax.ops import ctc
from u2moe_jax.ops import losses
from u2moe_jax.ops import masks
from u2moe_jax.ops import sequences
from u2moe_jax.training import metrics


@struct.dataclass
class Batch:
  """A padded batch.

  Attributes:
    features: log-mel frames before CMVN.
    feature_lengths: real frames; 0 for an empty row.
    labels: token ids, padded with -1.
    label_lengths: real labels.
    weights: 1 for real utterances, 0 for empty rows.
  """

  features: Float[Array, 'B T_in F']
  feature_lengths: Int[Array, 'B']
  labels: Int[Array, 'B U']
  label_lengths: Int[Array, 'B']
  weights: Float[Array, 'B']


@struct.dataclass
class Objective:
  """A loss, and what it was made of.

  Attributes:
    loss: what is minimised.
    metrics: parts, accuracy, expert statistics.
    outputs: the pass itself; what is not used costs nothing under jit.
  """

  loss: Float[Array, '']
  metrics: dict[str, metrics.Mean]
  outputs: u2.Outputs


def compute_objective(
  model: u2.U2MoeModel,
  params: PyTree,
  buffers: PyTree,
  batch: Batch,
  config: config_lib.TrainConfig,
  *,
  chunk: tuple[Int[Array, ''], Int[Array, '']] | None = None,
  dropout_key: Key[Array, ''] | None = None,
) -> Objective:
  """Runs the model teacher-forced and combines its losses.

  Args:
    model: the recogniser.
    params: its parameters.
    buffers: its buffers.
    batch: padded utterances.
    config: weights of the parts.
    chunk: (chunk_size, left_chunks) of the encoder mask; None means full
      context.
    dropout_key: switches dropout (and batch-norm updates) on.
  """
  chunk_size, left_chunks = (-1, -1) if chunk is None else chunk
  forward, backward = decoder_batches(batch, model.config)
  outputs = model.apply(
    {'params': params},
    batch.features,
    batch.feature_lengths,
    buffers,
    forward.inputs,
    backward.inputs,
    chunk_size=chunk_size,
    left_chunks=left_chunks,
    # The one switch: dropout, batch-norm updates and capacity hang on it.
    rngs=None if dropout_key is None else {'dropout': dropout_key},
  )
  # The global batch: under jit these are sums over all devices.
  real = batch.weights > 0
  count = jnp.maximum(jnp.sum(batch.weights), 1.0)
  parts = {'loss_ctc': _ctc(outputs, batch, model.config.blank_id)}
  results = {}
  if outputs.forward is not None:
    parts['loss_l2r'], correct = _attention(outputs.forward, forward, config)
    results['accuracy'] = metrics.Mean.of(correct, jnp.sum(forward.mask))
  if outputs.backward is not None:
    parts['loss_r2l'], _ = _attention(outputs.backward, backward, config)
  # An empty row has a loss too (of garbage); it must not count.
  sums = {k: jnp.sum(jnp.where(real, v, 0.0)) for k, v in parts.items()}
  divisors = dict.fromkeys(sums, count)
  # CTC stays a mean over utterances, as in the reference.
  if config.length_normalized:
    num_tokens = jnp.maximum(jnp.sum(forward.mask), 1)
    divisors |= {'loss_l2r': num_tokens, 'loss_r2l': num_tokens}
  loss = combine({k: v / divisors[k] for k, v in sums.items()}, config)
  router_loss, router_metrics = _router_terms(outputs, config)
  results |= {k: metrics.Mean.of(v, divisors[k]) for k, v in sums.items()}
  results |= router_metrics
  total = loss + router_loss
  # Weighed by utterances, as its parts are: batches have different numbers.
  results['loss'] = metrics.Mean.of(total * count, count)
  return Objective(loss=total, metrics=results, outputs=outputs)


def combine(
  parts: dict[str, Array], config: config_lib.TrainConfig
) -> Float[Array, '']:
  """Weighs the parts; without a decoder its share goes to what is there."""
  attention = parts.get('loss_l2r')
  if attention is None:
    return parts['loss_ctc']
  if 'loss_r2l' in parts:
    reverse = config.reverse_weight
    attention = (1 - reverse) * attention + reverse * parts['loss_r2l']
  return (
    config.ctc_weight * parts['loss_ctc'] + (1 - config.ctc_weight) * attention
  )


@struct.dataclass
class DecoderBatch:
  """Inputs and targets of one direction."""

  inputs: u2.DecoderInputs
  targets: Int[Array, 'B U1']
  mask: Array


def decoder_batches(
  batch: Batch, config: config_lib.ModelConfig
) -> tuple[DecoderBatch, DecoderBatch]:
  """Teacher-forcing inputs and targets, left-to-right and right-to-left."""

  def direction(labels: Int[Array, 'B U']) -> DecoderBatch:
    tokens, targets = sequences.add_sos_eos(
      labels, batch.label_lengths, sos=config.sos, eos=config.eos
    )
    # Of the targets, because inputs are padded with eos, a token.
    mask = targets >= 0
    # The padded tail of a real row is masked; so is all of an empty row.
    mask = mask & (batch.weights > 0)[:, None]
    return DecoderBatch(
      inputs=u2.DecoderInputs(tokens=tokens, mask=mask),
      targets=targets,
      mask=mask,
    )

  reversed_labels = sequences.reverse_by_length(
    batch.labels, batch.label_lengths
  )
  return direction(batch.labels), direction(reversed_labels)


def _ctc(outputs: u2.Outputs, batch: Batch, blank_id: int) -> Array:
  label_mask = masks.length_mask(
    batch.label_lengths, max_length=batch.labels.shape[1]
  )
  return ctc.ctc_loss(
    outputs.ctc_log_probs,
    outputs.encoder.mask,
    batch.labels,
    label_mask,
    blank_id=blank_id,
  )


def _attention(
  scores: u2.DecoderScores,
  direction: DecoderBatch,
  config: config_lib.TrainConfig,
) -> tuple[Array, Array]:
  log_probs = jax.nn.log_softmax(scores.logits)
  loss = losses.label_smoothed_kl(
    log_probs,
    direction.targets,
    direction.mask,
    smoothing=config.label_smoothing,
  )
  correct = losses.count_correct(log_probs, direction.targets, direction.mask)
  return loss, correct


def moe_layers(outputs: u2.Outputs) -> dict[str, moe.MoeStats]:
  """All MoE layers of a pass by name; leaves are stacked over blocks."""
  groups = {'encoder': outputs.encoder.moe}
  if outputs.forward is not None:
    groups['forward_decoder'] = outputs.forward.moe
  if outputs.backward is not None:
    groups['backward_decoder'] = outputs.backward.moe
  return {
    f'{group}.{name}': stats
    for group, layers in groups.items()
    for name, stats in layers.items()
  }


def _router_terms(
  outputs: u2.Outputs, config: config_lib.TrainConfig
) -> tuple[Array | float, dict[str, metrics.Mean]]:
  """Weighted router losses, and the statistics every step reports."""
  layers = moe_layers(outputs)
  results: dict[str, metrics.Mean] = {}
  if not layers:
    return 0.0, results
  for name, stats in layers.items():
    results[f'load/{name}'] = metrics.Mean.of(stats.summary.load)
    results[f'entropy/{name}'] = metrics.Mean.of(stats.summary.entropy)

  # Each layer name has as many values as blocks, and every block counts alike:
  # the weight of a loss does not hang on the depth.
  def mean_over_layers(field: str) -> Array:
    values = [getattr(s.summary, field) for s in layers.values()]
    return jnp.mean(jnp.concatenate(values))

  balance = mean_over_layers('balance_loss')
  z_loss = mean_over_layers('z_loss')
  results['balance_loss'] = metrics.Mean.of(balance)
  results['z_loss'] = metrics.Mean.of(z_loss)
  results['dropped'] = metrics.Mean.of(mean_over_layers('dropped'))
  fullest = [jnp.max(s.summary.most_loaded) for s in layers.values()]
  results['most_loaded_device'] = metrics.Mean.of(jnp.max(jnp.stack(fullest)))
  weighted = config.balance_loss_weight * balance
  return weighted + config.z_loss_weight * z_loss, results


def draw_training_chunk(
  key: Key[Array, ''], batch: Batch, config: config_lib.EncoderConfig
) -> tuple[Int[Array, ''], Int[Array, '']]:
  """The chunk mask of one training batch, as the encoder config asks."""
  unlimited = jnp.full((), -1, jnp.int32)
  if not config.use_dynamic_chunk:
    size = config.static_chunk_size or -1
    return jnp.full((), size, jnp.int32), unlimited
  geometry = subsampling.geometry(config.subsampling)
  lengths = geometry.output_length(batch.feature_lengths)
  # Buckets pad to fixed shapes; the draw must hang on what is spoken alone.
  return masks.draw_chunk(
    key,
    num_frames=jnp.max(lengths),
    rate=geometry.rate,
    with_left_chunks=config.use_dynamic_left_chunk,
  )
