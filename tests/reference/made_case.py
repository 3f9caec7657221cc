"""A case in the golden form that our own model fills.

It says nothing about the reference; it shows that the verifier reads names and
numbers of a case it has never seen: one-sided decoder, other chunks, experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.reference import golden_folder
from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.interop import wenet
from u2moe_jax.layers import subsampling
from u2moe_jax.models import cache as cache_lib

CHUNK, LEFT = 3, 1


def config():
  """One-sided, top-1 of three experts, x6, sos and eos of their own."""
  base = tiny.model_config(
    tiny.moe(num_experts=3, top_k=1), subsampling='conv2d6'
  )
  decoder = dataclasses.replace(base.decoder, num_reverse_blocks=0)
  return dataclasses.replace(base, decoder=decoder, sos_id=3, eos_id=4)


def write(folder):
  """Writes the case."""
  model_config = config()
  model, params, buffers = tiny.init(model_config)
  batch = jax.tree.map(jnp.asarray, tiny.batch())
  apply = lambda method: functools.partial(
    jax.jit(functools.partial(model.apply, method=method)), {'params': params}
  )
  full = apply('encode')(batch.features, batch.feature_lengths, buffers)
  arrays = {
    'feats': batch.features,
    'feats_lengths': batch.feature_lengths,
    'target': batch.labels,
    'target_lengths': batch.label_lengths,
    'encoder_out_full': full.frames,
    'encoder_mask': full.mask[:, None],
    'layer1_out': full.block_outputs[1],
  }
  layer = 'encoder.encoders.1.feed_forward'
  stats = full.moe['final']
  for name, field in (
    ('logits', stats.logits),
    ('topk_index', stats.expert_index),
    ('topk_weight', stats.expert_weight),
  ):
    # Of block 1: utterances behind each other, as the reference flattens them.
    flat = np.asarray(field[1]).reshape(-1, field.shape[-1])
    arrays[f'router_{name}.{layer}'] = flat
  chosen = np.asarray(stats.expert_index[1])[np.asarray(full.mask)]
  counts = np.bincount(chosen.reshape(-1), minlength=3).tolist()
  streamed, steps = _stream(apply('encode_chunk'), model_config, batch, buffers)
  results = {
    'router_expert_counts_valid_frames': {layer: counts},
    'stream_steps_utt0_[start,end,offset]': steps,
    'notes': 'made by ourselves',
  }
  features = config_lib.FeatureConfig(num_mel_bins=tiny.BINS)
  yaml = wenet.to_yaml(model_config, features)
  weights = wenet.state_dict(params, buffers, model_config)
  settings = {'wenet_config': yaml, 'sos': 3, 'eos': 4, 'names': list(weights)}
  return golden_folder.write(
    folder, arrays | streamed, results, settings, weights
  )


def _stream(encode_chunk, model_config, batch, buffers):
  """The first utterance chunk by chunk; the caches after the second chunk."""
  geometry = subsampling.geometry(model_config.encoder.subsampling)
  length = int(batch.feature_lengths[0])
  total = geometry.output_length(length)
  cache = cache_lib.init_cache(
    model_config.encoder, batch=1, capacity=CHUNK * LEFT
  )
  arrays, pieces, steps = {}, [], []
  for step, offset in enumerate(range(0, total, CHUNK)):
    start, count = offset * geometry.rate, min(CHUNK, total - offset)
    window = np.zeros((1, geometry.window(CHUNK), tiny.BINS), np.float32)
    # The last window is cut off by the end of the utterance; zeros behind it.
    piece = batch.features[:1, start : min(start + window.shape[1], length)]
    window[:, : piece.shape[1]] = piece
    steps.append([start, start + piece.shape[1], offset])
    output, cache = encode_chunk(
      jnp.asarray(window), jnp.array([count]), buffers, cache
    )
    pieces.append(output.frames[:, :count])
    # By then the cache is full, as CHUNK * LEFT is one chunk.
    if step == 1:
      name = f'cache_left{LEFT}_step{step}'
      pair = jnp.concatenate([cache.key[:, 0], cache.value[:, 0]], axis=-1)
      arrays[f'{name}_att'] = pair.swapaxes(1, 2)  # [L, H, P, 2 K]
      arrays[f'{name}_cnn'] = cache.convolution.swapaxes(2, 3)
      arrays[f'{name}_y'] = pieces[-1]
  arrays[f'stream_chunk{CHUNK}_left{LEFT}_utt0'] = np.concatenate(pieces, 1)
  return arrays, steps
