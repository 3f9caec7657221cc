"""Writes programs that run without model code (`exported.py` runs them).

FOLDER/
  programs.json   what they take: sizes, features, the stream's cache
  encode.bin      whole utterances to encoder frames and CTC log-probabilities
  chunk.bin       the next chunk of B streams to the same, and the next cache
  params/         the arrays both take (`checkpoint/mapped.py`)
  tokens/         the token table, if there is one

The programs are StableHLO with compatibility guarantees (`jax.export`), for
any batch and any length; XLA compiles each shape when it first comes. They run
on the kind of device they were made on.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from typing import Any

from flax import traverse_util
import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import mapped
from u2moe_jax.decoding import exported
from u2moe_jax.decoding import programs
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.layers import subsampling
from u2moe_jax.models import cache as cache_lib
from u2moe_jax.models import inference
from u2moe_jax.models import u2
from u2moe_jax.ops import grouped_matmul

Path = str | os.PathLike[str]

# With a symbolic batch nobody knows how many tokens there will be. These suit
# ten seconds of sound, and a chunk of one to four streams.
_BLOCK_SIZE = {'encode': 32, 'chunk': 8}
# Of these the programs take parameters; the decoders stay behind.
_TAKEN = ('params/encoder/', 'params/ctc/', 'buffers/')
_PARITY_SEED = 0


def export(
  checkpoint: Path, out: Path, *, chunk_size: int = 16, left_chunks: int = 4
) -> float:
  """Exports a model, compares, and then gives the folder its name.

  Args:
    checkpoint: a model directory of any form, a work directory or a step.
    out: the folder; an earlier export is replaced.
    chunk_size: encoder frames per chunk of the streaming program.
    left_chunks: chunks of left context it keeps.

  Returns:
    The largest difference between exported programs and model, over CTC
    log-probabilities of noise, of whole utterances and of streams.

  Raises:
    ValueError: if there is no checkpoint, `out` holds something else, or the
      chunks make no sense.
  """
  if chunk_size < 1 or left_chunks < 0:
    raise recognizer_lib.DecodeError(
      f'chunk_size={chunk_size}, left_chunks={left_chunks}: a stream needs a '
      'positive chunk, and a cache that does not grow'
    )
  out = pathlib.Path(out).absolute()
  _require_replaceable(out)
  found = directory.find(checkpoint, for_decoding=True)
  if not found.description.model.encoder.causal_conv:
    raise recognizer_lib.DecodeError(
      f'{found.params.parent}: this model has a non-causal convolution and '
      'cannot stream'
    )
  params, buffers = directory.restore(found)
  source = _Source(
    found.description, _taken(params, buffers), chunk_size, left_chunks
  )
  # Only what has been compared gets the name: a folder that is there is right.
  unfinished = out.with_name(out.name + '.unfinished')
  shutil.rmtree(unfinished, ignore_errors=True)
  _write(unfinished, source, found.tokens)
  difference = compare(exported.Programs(unfinished), source)
  directory.replace(out, unfinished)
  return difference


def _require_replaceable(out: pathlib.Path) -> None:
  is_other = out.is_dir() and any(out.iterdir())
  if out.is_file() or (is_other and not (out / exported.INDEX).is_file()):
    raise directory.CheckpointError(
      f'{out}: exists and holds no exported programs; it is left alone, choose '
      'another place'
    )


def _taken(params: PyTree, buffers: PyTree) -> dict[str, Array]:
  flat = traverse_util.flatten_dict(
    {'params': params, 'buffers': buffers}, sep='/'
  )
  return {path: x for path, x in flat.items() if path.startswith(_TAKEN)}


@dataclasses.dataclass(frozen=True)
class _Source:
  """What is exported.

  Attributes:
    description: the model.
    arrays: its parameters and buffers, by path.
    chunk_size: encoder frames per chunk.
    left_chunks: chunks of left context.
  """

  description: directory.Description
  arrays: dict[str, Array]
  chunk_size: int
  left_chunks: int

  def module(self, program: str = '') -> u2.U2MoeModel:
    """The model; for a program, with nothing chosen by the batch."""
    config = self.description.model
    if program:
      config = _with_fixed_executor(config, _BLOCK_SIZE[program])
    return u2.U2MoeModel(config, form=self.description.form)

  def cache(self, batch: int) -> dict[str, Array]:
    """That of streams that have heard nothing."""
    config = self.description.model
    return _as_dict(
      cache_lib.init_cache(
        config.encoder,
        batch=batch,
        capacity=self.left_chunks * self.chunk_size,
        dtype=jnp.dtype(config.dtype),
      )
    )

  @property
  def geometry(self) -> subsampling.Geometry:
    """Arithmetic of the subsampling."""
    return subsampling.geometry(self.description.model.encoder.subsampling)


def _encode(
  module: u2.U2MoeModel,
  arrays: dict[str, Array],
  features: Float[Array, 'B T_in F'],
  lengths: Int[Array, 'B'],
  chunk_size: int | Int[Array, ''],
  left_chunks: int | Int[Array, ''],
) -> dict[str, Array]:
  """Whole utterances, under a chunk mask."""
  # One flat dictionary goes in: its paths are the names in the file of arrays.
  tree = inference.nest(arrays.items())
  encoded = programs.encode(
    module,
    tree['params'],
    tree['buffers'],
    features,
    lengths,
    chunk_size=chunk_size,
    left_chunks=left_chunks,
    blank_penalty=0.0,
  )
  names = 'frames', 'log_probs', 'mask'
  return {name: getattr(encoded, name) for name in names}


def _chunk(
  module: u2.U2MoeModel,
  arrays: dict[str, Array],
  features: Float[Array, 'B T_in F'],
  num_valid: Int[Array, 'B'],
  cache: PyTree,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """The next chunk of B streams."""
  tree = inference.nest(arrays.items())
  variables = {'params': tree['params']}
  encoded, cache = module.apply(
    variables,
    features,
    num_valid,
    tree['buffers'],
    cache_lib.StreamingCache(**cache),
    method='encode_chunk',
  )
  log_probs = module.apply(variables, encoded.frames, method='ctc_log_probs')
  outputs = {
    'frames': encoded.frames,
    'log_probs': log_probs,
    'mask': encoded.mask,
  }
  return outputs, _as_dict(cache)


_jitted_chunk = jax.jit(_chunk, static_argnums=0)


def _with_fixed_executor(
  config: config_lib.ModelConfig, block_size: int
) -> config_lib.ModelConfig:
  # Both would be chosen by the number of tokens, a symbol while exporting.
  moe = config.encoder.moe
  moe = dataclasses.replace(
    moe,
    executor=grouped_matmul.choose(moe.executor, 1),
    block_size=moe.block_size or block_size,
  )
  encoder = dataclasses.replace(config.encoder, moe=moe)
  return dataclasses.replace(config, encoder=encoder)


def _as_dict(cache: cache_lib.StreamingCache) -> dict[str, Array]:
  # Not `asdict`, which copies; exported programs know plain containers only.
  return {
    field.name: getattr(cache, field.name)
    for field in dataclasses.fields(cache)
  }


def _write(
  folder: pathlib.Path, source: _Source, tokens: pathlib.Path | None
) -> None:
  arrays = ((path, np.asarray(x)) for path, x in source.arrays.items())
  mapped.write(folder / 'params', arrays)
  (folder / exported.ENCODE).write_bytes(_export_encode(source))
  (folder / exported.CHUNK).write_bytes(_export_chunk(source))
  if tokens is not None:
    shutil.copytree(tokens, folder / 'tokens')
  text = json.dumps(_index(source), indent=2)
  (folder / exported.INDEX).write_text(text + '\n', encoding='utf-8')


def _export_encode(source: _Source) -> bytes:
  model, least = source.description.model, source.geometry.window(1)
  # For less the unpadded convolutions of the subsampling have no output.
  batch, frames = jax_export.symbolic_shape(
    'b, t', constraints=[f't >= {least}']
  )
  module = source.module('encode')
  number = jax.ShapeDtypeStruct((), jnp.int32)
  program = jax.jit(functools.partial(_encode, module))
  return jax_export.export(program)(
    _abstract(source.arrays),
    jax.ShapeDtypeStruct((batch, frames, model.feature_dim), jnp.float32),
    jax.ShapeDtypeStruct((batch,), jnp.int32),
    number,
    number,
  ).serialize()


def _export_chunk(source: _Source) -> bytes:
  (batch,) = jax_export.symbolic_shape('b')
  window = source.geometry.window(source.chunk_size)
  module = source.module('chunk')
  bins = source.description.model.feature_dim
  program = jax.jit(functools.partial(_chunk, module))
  cache = {
    name: jax.ShapeDtypeStruct(
      tuple(batch if size is None else size for size in shape), dtype
    )
    for name, (shape, dtype) in _cache_shapes(source).items()
  }
  return jax_export.export(program)(
    _abstract(source.arrays),
    jax.ShapeDtypeStruct((batch, window, bins), jnp.float32),
    jax.ShapeDtypeStruct((batch,), jnp.int32),
    cache,
  ).serialize()


def _abstract(arrays: dict[str, Array]) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()
  }


def _cache_shapes(
  source: _Source,
) -> dict[str, tuple[list[int | None], np.dtype]]:
  """Shape and type of every part of the cache; None stands for the batch."""
  # The batch axis of a part is where caches of one and two streams differ.
  one, two = (jax.eval_shape(lambda n=n: source.cache(n)) for n in (1, 2))
  return {
    name: (
      [
        size if size == other else None
        for size, other in zip(one[name].shape, two[name].shape, strict=True)
      ],
      np.dtype(one[name].dtype),
    )
    for name in one
  }


def _index(source: _Source) -> dict[str, Any]:
  """What someone without our code has to know."""
  model, geometry = source.description.model, source.geometry
  return {
    'format_version': exported.FORMAT_VERSION,
    'platform': jax.default_backend(),
    'features': config_lib.to_dict(source.description.features),
    'vocab_size': model.vocab_size,
    'blank_id': model.blank_id,
    'input_frames_per_frame': geometry.rate,
    'chunk_size': source.chunk_size,
    'left_chunks': source.left_chunks,
    'chunk_input_frames': geometry.window(source.chunk_size),
    'cache': {
      name: {'shape': shape, 'dtype': dtype.name}
      for name, (shape, dtype) in _cache_shapes(source).items()
    },
    'provenance': directory.provenance(),
  }


def compare(ours: exported.Programs, source: _Source) -> float:
  """The largest difference of CTC log-probabilities, over real frames."""
  geometry, size = source.geometry, source.chunk_size
  module = source.module()
  frames = geometry.window(2 * size)
  # A full utterance and one that ends in its second chunk, so that padding and
  # a part of a chunk are compared too.
  lengths = np.array([frames, geometry.window(size + 1)], np.int32)
  rng = np.random.default_rng(_PARITY_SEED)
  bins = source.description.model.feature_dim
  features = rng.normal(size=(2, frames, bins)).astype(np.float32)

  def difference(found: dict[str, Array], expected: dict[str, Array]) -> float:
    # What stands in padding is nobody's business.
    mask = np.asarray(expected['mask'])[..., None]
    gap = np.asarray(found['log_probs']) - np.asarray(expected['log_probs'])
    return float(np.abs(np.where(mask, gap, 0)).max())

  largest = 0.0
  for chunks in ((-1, -1), (size, source.left_chunks)):
    expected = _encode(module, source.arrays, features, lengths, *chunks)
    found = ours.encode(features, lengths, *chunks)
    largest = max(largest, difference(found, expected))
  caches = ours.init_cache(2), source.cache(2)
  valid = np.asarray(geometry.output_length(lengths))
  for first in (0, size):
    start = first * geometry.rate
    # The chunk moves by `size` encoder frames, the window reaches further.
    window = features[:, start : start + geometry.window(size)]
    count = np.clip(valid - first, 0, size).astype(np.int32)
    found, ours_next = ours.encode_chunk(window, count, caches[0])
    expected, theirs_next = _jitted_chunk(
      module, source.arrays, window, count, caches[1]
    )
    caches = ours_next, theirs_next
    largest = max(largest, difference(found, expected))
  return largest
