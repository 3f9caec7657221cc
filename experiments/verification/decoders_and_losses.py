"""CTC head, both decoders teacher-forced, and every part of the loss."""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.verification import compare
from experiments.verification import encoder
from experiments.verification import port as port_lib
from experiments.verification import registry
from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import PyTree
from u2moe_jax.models import u2
from u2moe_jax.ops import ctc
from u2moe_jax.ops import losses
from u2moe_jax.ops import masks
from u2moe_jax.training import objective


@functools.partial(jax.jit, static_argnums=0, static_argnames='blank_penalty')
def _log_probs(
  model: u2.U2MoeModel,
  params: PyTree,
  frames: Float[Array, 'B T D'],
  *,
  blank_penalty: float,
):
  return model.apply(
    {'params': params},
    frames,
    blank_penalty=blank_penalty,
    method='ctc_log_probs',
  )


def log_probs(
  port: port_lib.Port,
  chunk: int = -1,
  left: int = -1,
  blank_penalty: float = 0.0,
) -> jax.Array:
  """CTC log-probs of the batch. (The reference ignores a penalty below 0.)"""
  blank_penalty = max(blank_penalty, 0.0)
  return port.once(
    ('log_probs', *port.chunk(chunk, left), blank_penalty),
    lambda: _log_probs(
      port.model,
      port.params,
      encoder.encode(port, chunk, left).frames,
      blank_penalty=blank_penalty,
    ),
  )


@functools.partial(jax.jit, static_argnames=('model', 'config', 'training'))
def _objective_and_gradients(
  model: u2.U2MoeModel,
  params: PyTree,
  buffers: PyTree,
  batch: objective.Batch,
  chunk: tuple[Int[Array, ''], Int[Array, '']],
  *,
  config: config_lib.TrainConfig,
  training: bool,
):
  def loss(params: PyTree):
    result = objective.compute_objective(
      model,
      params,
      buffers,
      batch,
      config,
      chunk=chunk,
      # The rates are 0; the key switches batch statistics on.
      dropout_key=jax.random.key(0) if training else None,
    )
    return result.loss, result

  gradients, result = jax.grad(loss, has_aux=True)(params)
  return result, gradients


def run_objective(
  port: port_lib.Port,
  chunk: int = -1,
  left: int = -1,
  *,
  training: bool = False,
) -> tuple[objective.Objective, PyTree]:
  """Loss, parts and gradients of the batch."""
  return port.once(
    ('objective', chunk, left, training),
    lambda: _objective_and_gradients(
      port.model,
      port.params,
      port.buffers,
      port.batch,
      # As arrays, so that all chunk sizes are one program.
      (jnp.asarray(chunk), jnp.asarray(left)),
      config=port.train_config,
      training=training,
    ),
  )


def direction(
  port: port_lib.Port, *, reverse: bool, chunk: int = -1, left: int = -1
) -> tuple[u2.DecoderScores, objective.DecoderBatch]:
  """A decoder's scores, and what it was fed and asked."""
  outputs = run_objective(port, chunk, left)[0].outputs
  scores = outputs.backward if reverse else outputs.forward
  if scores is None:
    raise ValueError('the model has no such decoder')
  # A pair, left-to-right first, so `reverse` is the index.
  return scores, objective.decoder_batches(port.batch, port.config)[reverse]


def _ctc_log_probs(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  chunk, left = quantity.integer('chunk', -1), quantity.integer('left', -1)
  penalty = quantity.number('penalty', 0.0)
  yield compare.close(
    quantity.path,
    log_probs(port, chunk, left, penalty),
    quantity.value,
    compare.LOG_PROBS,
    # Which frames are real does not hang on chunks.
    mask=encoder.encode(port).mask,
  )


def _ctc_loss(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  batch = port.batch
  ours = ctc.ctc_loss(
    log_probs(port),
    encoder.encode(port).mask,
    batch.labels,
    masks.length_mask(batch.label_lengths, max_length=batch.labels.shape[1]),
    blank_id=port.config.blank_id,
  )
  yield compare.close(quantity.path, ours, quantity.value, compare.LOSS)


def _labels(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """What a decoder is fed (`in`) and asked (`out`)."""
  reverse = quantity.text('direction') == 'r'
  batch = objective.decoder_batches(port.batch, port.config)[reverse]
  ours = batch.inputs.tokens if quantity.text('side') == 'in' else batch.targets
  expected = quantity.value
  if quantity.text('side') == 'out':
    ignored = port.case.settings.get('ignore_id', -1)
    # Its padding has an id of its own choice; ours is -1.
    expected = np.where(expected == ignored, -1, expected)
  yield compare.equal(quantity.path, ours, expected)


def _decoder_log_probs(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  scores, batch = direction(port, reverse=quantity.text('direction') == 'r2l')
  yield compare.close(
    quantity.path,
    jax.nn.log_softmax(scores.logits),
    quantity.value,
    compare.LOG_PROBS,
    mask=batch.mask,
  )


def _loss(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """One number of the loss, with full context or under a static chunk.

  The reference has null for a part without weight, which it does not compute.
  """
  if quantity.value is None:
    # So null must be where the weight is 0.
    share = port.train_config.ctc_weight
    weight = share if quantity.text('part') == 'loss_ctc' else 1 - share
    yield compare.equal(quantity.path, weight, 0.0)
    return
  chunk, left = quantity.integer('chunk', -1), quantity.integer('left', -1)
  ours = loss_part(port, quantity.text('part'), chunk, left)
  yield compare.close(quantity.path, ours, quantity.value, compare.LOSS)


def loss_part(
  port: port_lib.Port,
  part: str,
  chunk: int = -1,
  left: int = -1,
  *,
  training: bool = False,
) -> float:
  """The loss or a part of it, by the reference's name.

  A decoder without weight is not run by the reference: its loss is 0.
  """
  result, _ = run_objective(port, chunk, left, training=training)
  # Names with a slash are arrays of single routers.
  metrics = {k: m for k, m in result.metrics.items() if '/' not in k}
  # Metrics are a sum and a count, so that they can be added up.
  parts = {k: float(m.total / m.count) for k, m in metrics.items()}
  parts.setdefault('loss_l2r', 0.0)
  reverse = port.train_config.reverse_weight
  # Ours runs it as soon as the model has it.
  if reverse == 0:
    parts['loss_r2l'] = 0.0
  # The reference tells the weighted sum of both decoders as one number.
  parts['loss_att'] = (1 - reverse) * parts['loss_l2r'] + reverse * parts.get(
    'loss_r2l', 0.0
  )
  parts['loss'] = float(result.loss)
  parts['th_accuracy'] = parts.get('accuracy', 0.0)
  for name, is_reverse in (('loss_l2r', False), ('loss_r2l', True)):
    for form in ('length_normalized', 'no_smoothing'):
      if part == f'{name}_{form}':
        return _variant(port, form, chunk, left, reverse=is_reverse)
  return parts[part]


def _variant(
  port: port_lib.Port, form: str, chunk: int, left: int, *, reverse: bool
) -> float:
  """A decoder's loss by token instead of utterance, or without smoothing."""
  scores, batch = direction(port, reverse=reverse, chunk=chunk, left=left)
  config = port.train_config
  total = losses.label_smoothed_kl(
    jax.nn.log_softmax(scores.logits),
    batch.targets,
    batch.mask,
    smoothing=0.0 if form == 'no_smoothing' else config.label_smoothing,
  ).sum()
  by_token = form == 'length_normalized' or config.length_normalized
  # The mask has a place for eos, which counts as a token.
  return float(total / (batch.mask.sum() if by_token else len(batch.mask)))


_PARTS = (
  'loss|loss_ctc|loss_l2r|loss_r2l|loss_att|th_accuracy|'
  'loss_(l2r|r2l)_(length_normalized|no_smoothing)'
)

RULES = (
  registry.Rule(
    r'io/ctc_logprobs_(full|chunk(?P<chunk>\d+)_left(?P<left>-?\d+))'
    r'(_blank_penalty(?P<penalty>-?[\d.]+))?',
    _ctc_log_probs,
  ),
  registry.Rule('io/ctc_loss_per_utt', _ctc_loss),
  registry.Rule(r'io/dec_(?P<direction>ys|r)_(?P<side>in|out)', _labels),
  registry.Rule(r'io/dec_(?P<direction>l2r|r2l)_logprobs', _decoder_log_probs),
  registry.Rule(
    r'results/loss/(full_context|static_chunk(?P<chunk>\d+)'
    rf'_(all_left|left(?P<left>-?\d+)))/(?P<part>{_PARTS})',
    _loss,
  ),
)
