"""A tiny recogniser with words to compare, and noise for it to hear."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.frontend import fbank

RATE = 16000


def model_config(**encoder):
  """Two blocks of width 16 with experts, both decoders."""
  moe = config_lib.MoeConfig(num_experts=4)
  return config_lib.ModelConfig(
    vocab_size=12,
    feature_dim=20,
    encoder=config_lib.EncoderConfig(
      num_blocks=2,
      model_dim=16,
      num_heads=2,
      ffn_dim=32,
      conv_kernel=4,
      moe=moe,
      **encoder,
    ),
    decoder=config_lib.DecoderConfig(
      num_blocks=1, num_reverse_blocks=1, num_heads=2, ffn_dim=32, moe=moe
    ),
  )


def make(config, **decode):
  """A recogniser with random weights; `decode` are keys of its config."""
  params = jax.tree_util.tree_map_with_path(
    _random, directory.abstract_variables(config)['params']
  )
  # Frames without CMVN are all alike; this gives words to compare.
  features = config_lib.FeatureConfig(num_mel_bins=20)
  frames = fbank.fbank(sounds([1.0])[0], features)
  cmvn = {'mean': frames.mean(axis=0), 'istd': 2 / frames.std(axis=0)}
  decode = {'beam': 4, 'batch_seconds': 4.0, **decode}
  return recognizer_lib.Recognizer(
    directory.Description(config, features),
    params,
    {'cmvn': cmvn},
    config=config_lib.DecodeConfig(**decode),
  )


def sounds(lengths, seed=0):
  """Noise of so many seconds each, softly beginning."""
  rng = np.random.default_rng(seed)
  return [
    (0.3 * rng.normal(size=int(n * RATE)) * np.linspace(0, 1, int(n * RATE)))
    .clip(-1, 1)
    .astype(np.float32)
    for n in lengths
  ]


def _random(path, leaf):
  """Weights without compiling an initialiser; large, for peaky posteriors."""
  names = jax.tree_util.keystr(path)
  # By name: a parameter more leaves the others as they are.
  rng = np.random.default_rng(zlib.crc32(names.encode()))
  values = rng.normal(size=leaf.shape) * (1.5 if 'kernel' in names else 0.3)
  fan_in = leaf.shape[-2] if leaf.ndim > 1 and 'kernel' in names else 1
  # Normalised by the inputs, and scales around 1.
  values = values / fan_in**0.5 + ('scale' in names)
  return jnp.asarray(values, leaf.dtype)


def changed(recognizer, **changes):
  """The same with other keys of its config."""
  return recognizer.with_config(
    dataclasses.replace(recognizer.config, **changes)
  )
