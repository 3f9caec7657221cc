"""Mixture of Experts: router logits, choices, weights, loads."""

from collections.abc import Iterator
import re

import numpy as np

from experiments.verification import compare
from experiments.verification import decoders_and_losses
from experiments.verification import encoder
from experiments.verification import port as port_lib
from experiments.verification import registry
from u2moe_jax.layers import moe

_ENCODER_LAYER = re.compile(
  r'encoder\.encoders\.(\d+)\.feed_forward(_macaron)?'
)
_DECODER_LAYER = re.compile(
  r'decoder\.(left_decoder\.|right_decoder\.)?decoders\.(\d+)\.feed_forward'
)


def _layer(
  port: port_lib.Port, name: str
) -> tuple[moe.MoeStats, int, np.ndarray]:
  """Statistics, block number and valid tokens of one of the layers.

  The encoder runs with full context, the decoders teacher-forced on it.
  """
  match = _ENCODER_LAYER.fullmatch(name)
  if match is not None:
    output = encoder.encode(port)
    stats = output.moe['macaron' if match[2] else 'final']
    return stats, int(match[1]), np.asarray(output.mask)
  match = _DECODER_LAYER.fullmatch(name)
  if match is None:
    raise ValueError(f'no MoE layer {name!r}')
  scores, direction = decoders_and_losses.direction(
    port, reverse=match[1] == 'right_decoder.'
  )
  return scores.moe['ffn'], int(match[2]), np.asarray(direction.mask)


def _router(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """One array of one router; tokens are flattened, utterances first."""
  stats, block, mask = _layer(port, quantity.text('layer'))
  part = quantity.text('part')
  field = {
    'logits': stats.logits,
    'topk_index': stats.expert_index,
    'topk_weight': stats.expert_weight,
  }[part]
  # Stacked over the blocks: in the reference all of them have experts.
  ours = np.asarray(field)[block]  # [B, T, E or J]
  ours = ours.reshape(-1, ours.shape[-1])  # [B * T, E or J]
  mask = mask.reshape(-1)  # [B * T]
  if part == 'topk_index':
    yield compare.equal(quantity.path, ours, quantity.value, mask=mask)
  else:
    yield compare.close(
      quantity.path, ours, quantity.value, compare.ENCODER, mask=mask
    )


def _counts(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Tokens (times top-k) that each expert got, padding left out."""
  stats, block, mask = _layer(port, quantity.text('layer'))
  chosen = np.asarray(stats.expert_index)[block][mask]  # [tokens, J]
  num_experts = stats.logits.shape[-1]
  ours = np.bincount(chosen.reshape(-1), minlength=num_experts)
  yield compare.equal(quantity.path, ours, np.asarray(quantity.value))


RULES = (
  registry.Rule(
    r'io/router_(?P<part>logits|topk_index|topk_weight)\.(?P<layer>.+)', _router
  ),
  registry.Rule(
    r'results/router_expert_counts_valid_frames/(?P<layer>.+)', _counts
  ),
)
