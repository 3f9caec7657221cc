"""Tiny models and random batches that many tests share."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.models import u2
from u2moe_jax.training import objective

VOCAB = 11
BINS = 20


def moe(**changes) -> config_lib.MoeConfig:
  """Four experts, top-2."""
  defaults = {'num_experts': 4, 'top_k': 2}
  return config_lib.MoeConfig(**{**defaults, **changes})


def model_config(
  experts: config_lib.MoeConfig | None = None, *, decoders: int = 1, **encoder
) -> config_lib.ModelConfig:
  """Width 16, two blocks, no dropout; `encoder` overrides encoder keys."""
  experts = experts or config_lib.MoeConfig()
  defaults = {
    'num_blocks': 2,
    'model_dim': 16,
    'num_heads': 2,
    'ffn_dim': 24,
    'conv_kernel': 4,
    'dropout': 0.0,
    'attention_dropout': 0.0,
    'positional_dropout': 0.0,
    'moe': experts,
  }
  return config_lib.ModelConfig(
    vocab_size=VOCAB,
    feature_dim=BINS,
    encoder=config_lib.EncoderConfig(**{**defaults, **encoder}),
    decoder=config_lib.DecoderConfig(
      num_blocks=decoders,
      num_reverse_blocks=decoders,
      num_heads=2,
      ffn_dim=24,
      dropout=0.0,
      self_attention_dropout=0.0,
      cross_attention_dropout=0.0,
      positional_dropout=0.0,
      moe=experts,
    ),
  )


def init(config: config_lib.ModelConfig, seed: int = 0):
  """A model, random parameters and buffers."""
  model = u2.U2MoeModel(config)
  shapes = nn.meta.unbox(
    jax.eval_shape(lambda key: u2.init_params(model, key), jax.random.key(0))
  )
  # Drawn by NumPy: compiling the real initial values takes seconds.
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    # Scales of norms lie around 1, as they begin.
    center = 1.0 if 'scale' in jax.tree_util.keystr(path[-1:]) else 0.0
    spread = 0.1 if leaf.ndim < 3 else 0.4
    values = center + spread * rng.normal(size=leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  buffers = u2.init_buffers(config)
  buffers['cmvn'] = {
    'mean': jnp.asarray(rng.normal(size=BINS), jnp.float32),
    'istd': jnp.asarray(rng.uniform(0.5, 1.5, BINS), jnp.float32),
  }
  return model, params, buffers


def batch(
  lengths=(47, 39, 31, 23), label_lengths=(4, 3, 2, 1), seed: int = 0
) -> objective.Batch:
  """Random utterances; a length of 0 makes an empty row."""
  rng = np.random.default_rng(seed)
  lengths, counts = np.array(lengths, np.int32), np.array(label_lengths)
  features = rng.normal(size=(len(lengths), max(lengths), BINS))
  # Neither the blank, 0, nor sos and eos, the last id.
  labels = rng.integers(1, VOCAB - 1, size=(len(lengths), max(counts)))
  # Padding as the pipeline leaves it: frames of zeros, labels of -1.
  features[np.arange(max(lengths)) >= lengths[:, None]] = 0.0
  labels[np.arange(max(counts)) >= counts[:, None]] = -1
  return objective.Batch(
    features=features.astype(np.float32),
    feature_lengths=lengths,
    labels=labels.astype(np.int32),
    label_lengths=counts.astype(np.int32),
    weights=(lengths > 0).astype(np.float32),
  )


def replace_encoder(config: config_lib.ModelConfig, **changes):
  """A model config with other encoder keys."""
  encoder = dataclasses.replace(config.encoder, **changes)
  return dataclasses.replace(config, encoder=encoder)
