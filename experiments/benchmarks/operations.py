"""Multiply-adds of a pass, and how many the machine does in a product.

The share of the second that the first reaches is the MFU. It is counted for
the tokens that there are: what an executor computes beyond them is its loss.
"""

import dataclasses
import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp

from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.decoding import programs
from u2moe_jax.layers import subsampling
from u2moe_jax.models import cache as cache_lib
from u2moe_jax.models import u2
from u2moe_jax.training import flops

# A product whose speed is the peak; it takes a tenth of a second or so.
_PEAK_SIZE = {'cpu': 2048, 'gpu': 8192, 'tpu': 8192}
_PEAK_REPEATS = 7
# The backward pass has two products for each of the forward pass.
_PASSES_OF_A_STEP = 3


def num_frames(config: config_lib.ModelConfig, num_inputs: int) -> int:
  """Encoder frames of so many input frames."""
  geometry = subsampling.geometry(config.encoder.subsampling)
  return int(geometry.output_length(num_inputs))


def encode(
  config: config_lib.ModelConfig, *, batch: int, num_inputs: int
) -> float:
  """Operations of encoder and CTC on full utterances, a multiply-add being two.

  Args:
    config: the model.
    batch: utterances.
    num_inputs: input frames of each.
  """
  dense = _without_experts(config)
  traced = programs.encode.trace(
    u2.U2MoeModel(dense),
    **directory.abstract_variables(dense),
    features=_abstract((batch, num_inputs, config.feature_dim)),
    lengths=_abstract((batch,), jnp.int32),
    chunk_size=-1,
    left_chunks=-1,
    blank_penalty=0.0,
  )
  tokens = batch * num_frames(config, num_inputs)
  return flops.count(traced.jaxpr) + _of_experts(config.encoder, config, tokens)


def chunk(
  config: config_lib.ModelConfig,
  *,
  batch: int,
  chunk_size: int,
  left_chunks: int,
) -> float:
  """Operations of encoder and CTC on the next chunk of streams.

  Args:
    config: the model.
    batch: streams.
    chunk_size: encoder frames of a chunk.
    left_chunks: chunks that attention sees to the left.
  """
  dense = _without_experts(config)
  geometry = subsampling.geometry(config.encoder.subsampling)
  cache = jax.eval_shape(
    functools.partial(
      cache_lib.init_cache,
      config.encoder,
      batch=batch,
      capacity=left_chunks * chunk_size,
      dtype=jnp.dtype(config.dtype),
    )
  )
  model = u2.U2MoeModel(dense)

  def run(params, buffers, features, num_valid, cache):
    encoded, _ = model.apply(
      {'params': params},
      features,
      num_valid,
      buffers,
      cache,
      method='encode_chunk',
    )
    return model.apply(
      {'params': params}, encoded.frames, method='ctc_log_probs'
    )

  traced = jax.jit(run).trace(
    **directory.abstract_variables(dense),
    features=_abstract(
      (batch, geometry.window(chunk_size), config.feature_dim)
    ),
    num_valid=_abstract((batch,), jnp.int32),
    cache=cache,
  )
  tokens = batch * chunk_size
  return flops.count(traced.jaxpr) + _of_experts(config.encoder, config, tokens)


def train(
  config: config_lib.ModelConfig, *, batch: int, num_inputs: int, labels: int
) -> float:
  """Operations of a training step, nothing computed twice.

  Args:
    config: the model.
    batch: utterances.
    num_inputs: input frames of each.
    labels: tokens of each.
  """
  dense = _without_experts(config)
  variables = directory.abstract_variables(dense)
  inputs = u2.DecoderInputs(
    # One more than labels: sos stands in front of them.
    tokens=_abstract((batch, labels + 1), jnp.int32),
    mask=_abstract((batch, labels + 1), jnp.bool_),
  )
  decoder = config.decoder
  model = u2.U2MoeModel(dense)
  traced = jax.jit(
    lambda params, buffers, features, lengths, *decoders: model.apply(
      {'params': params}, features, lengths, buffers, *decoders
    )
  ).trace(
    variables['params'],
    variables['buffers'],
    _abstract((batch, num_inputs, config.feature_dim)),
    _abstract((batch,), jnp.int32),
    inputs,
    inputs,
  )
  total = flops.count(traced.jaxpr)
  frames = batch * num_frames(config, num_inputs)
  total += _of_experts(config.encoder, config, frames)
  for num_blocks in (decoder.num_blocks, decoder.num_reverse_blocks):
    tokens = batch * (labels + 1)
    total += _of_experts(decoder, config, tokens, num_blocks=num_blocks)
  return _PASSES_OF_A_STEP * total


def _abstract(shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _without_experts(config: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """The model with one expert in place of many: its loops can be counted."""
  none = config_lib.MoeConfig()
  return dataclasses.replace(
    config,
    encoder=dataclasses.replace(config.encoder, moe=none),
    decoder=dataclasses.replace(config.decoder, moe=none),
  )


def _of_experts(
  stack: config_lib.EncoderConfig | config_lib.DecoderConfig,
  config: config_lib.ModelConfig,
  tokens: int,
  *,
  num_blocks: int | None = None,
) -> float:
  """What the routers do, and the experts beyond the first of each token."""
  if isinstance(stack, config_lib.EncoderConfig):
    kinds = stack.expert_ffns
  else:
    kinds = stack.expert_ffns(num_blocks or 0)
  width, moe = config.encoder.model_dim, stack.moe
  layers = sum(map(len, kinds))
  expert = 2 * width * stack.ffn_dim
  # In multiply-adds: two products an expert; the first expert is counted with
  # the dense model.
  each = (moe.top_k - 1) * expert + width * moe.num_experts
  return 2.0 * tokens * layers * each


@functools.cache
def peak(dtype: str) -> float:
  """Operations a second of a large product of two square matrices, measured.

  Args:
    dtype: of both; int8 sums in int32.
  """
  size = _PEAK_SIZE.get(jax.default_backend(), _PEAK_SIZE['gpu'])
  one = jnp.ones((size, size), dtype)
  # Sums of 8-bit products do not fit 8 bits.
  total = jnp.int32 if dtype == 'int8' else None

  @jax.jit
  def product(x: jax.Array, y: jax.Array):
    return jax.lax.dot(x, y, preferred_element_type=total)

  product(one, one).block_until_ready()
  seconds = []
  for _ in range(_PEAK_REPEATS):
    begun = time.perf_counter()
    product(one, one).block_until_ready()
    seconds.append(time.perf_counter() - begun)
  return 2.0 * math.pow(size, 3) / statistics.median(seconds)


def record(operations: float, wall_s: float, *, dtype: str) -> dict[str, float]:
  """The fields `gflop` and `mfu`."""
  share = operations / wall_s / (peak(dtype) * jax.device_count())
  gflop = float(f'{operations / 1e9:.4g}')  # models differ by a factor of 1e6
  return {'gflop': gflop, 'mfu': round(share, 4)}
