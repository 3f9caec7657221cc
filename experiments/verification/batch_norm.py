"""One training step with batch statistics (padded frames counted)."""

from collections.abc import Iterator

import numpy as np

from experiments.verification import compare
from experiments.verification import decoders_and_losses
from experiments.verification import gradients
from experiments.verification import port as port_lib
from experiments.verification import registry

_FIELDS = {'running_mean': 'mean', 'running_var': 'variance'}


def _statistics(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  result, _ = decoders_and_losses.run_objective(port, training=True)
  after = result.outputs.encoder.buffers['conv_norm']
  field = after[_FIELDS[quantity.text('field')]]
  # The blocks are stacked in front.
  ours = np.asarray(field)[quantity.integer('block', 0)]  # [D]
  yield compare.close(quantity.path, ours, quantity.value, compare.ENCODER)


def _loss(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  part = quantity.text('part')
  ours = decoders_and_losses.loss_part(port, part, training=True)
  yield compare.close(quantity.path, ours, quantity.value, compare.LOSS)


def _gradient_norm(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  _, tree = decoders_and_losses.run_objective(port, training=True)
  ours = gradients.total_norm(gradients.by_name(port, tree))
  # A total is its own norm.
  limit = gradients.tolerance(quantity.value, quantity.value)
  yield compare.close(quantity.path, ours, quantity.value, limit)


RULES = (
  registry.Rule(
    r'io/bn_after\.encoder\.encoders\.(?P<block>\d+)\.conv_module\.norm\.'
    r'(?P<field>running_mean|running_var)',
    _statistics,
  ),
  registry.Rule('results/bn_train_mode/grad_norm_total', _gradient_norm),
  registry.Rule(
    r'results/bn_train_mode/'
    r'(?P<part>loss|loss_ctc|loss_l2r|loss_r2l|loss_att|th_accuracy)',
    _loss,
  ),
)
