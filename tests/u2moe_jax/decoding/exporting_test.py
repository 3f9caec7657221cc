"""Exported programs answer as the model does, for any batch and length."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.reference import tiny_recognizer
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import optimized
from u2moe_jax.decoding import batching
from u2moe_jax.decoding import exported
from u2moe_jax.decoding import exporting
from u2moe_jax.decoding import recognizer as recognizer_lib

_CHUNK, _LEFT = 4, 1
ROOT = pathlib.Path(__file__).parents[3]


def _model_config():
  """Small, since a program is compiled for every shape."""
  config = tiny_recognizer.model_config()
  moe = config_lib.MoeConfig(num_experts=3, where='final')
  encoder = dataclasses.replace(config.encoder, num_blocks=1, moe=moe)
  decoder = config_lib.DecoderConfig(num_blocks=0, num_reverse_blocks=0)
  return dataclasses.replace(config, encoder=encoder, decoder=decoder)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A recogniser, the exported programs of its inference form, its folder."""
  recognizer = tiny_recognizer.make(_model_config(), mode='ctc_greedy_search')
  folder = tmp_path_factory.mktemp('export')
  directory.write(
    folder / 'model',
    recognizer.description,
    recognizer.params,
    recognizer.buffers,
  )
  optimized.optimize(folder / 'model', folder / 'fast')
  difference = exporting.export(
    folder / 'fast',
    folder / 'programs',
    chunk_size=_CHUNK,
    left_chunks=_LEFT,
  )
  assert difference < 1e-4
  return recognizer, exported.Programs(folder / 'programs'), folder


def _encode(recognizer, chunk_size, left_chunks):
  """Three utterances in a batch, and what the model makes of them."""
  recognizer = tiny_recognizer.changed(
    recognizer, chunk_size=chunk_size, left_chunks=left_chunks
  )
  sounds = tiny_recognizer.sounds([0.8, 0.4, 0.6])
  features = [recognizer.features(sound) for sound in sounds]
  lengths = np.array([len(each) for each in features], np.int32)
  padded = np.zeros((len(features), lengths.max(), 20), np.float32)
  for row, each in enumerate(features):
    padded[row, : len(each)] = each
  batch = batching.PaddedBatch(
    indices=tuple(range(len(features))), features=padded, lengths=lengths
  )
  return batch, recognizer.encode(batch)


@pytest.mark.parametrize('chunks', [(-1, -1), (_CHUNK, _LEFT)])
def test_whole_utterances(made, chunks):
  recognizer, programs, _ = made
  batch, expected = _encode(recognizer, *chunks)
  found = programs.encode(batch.features, batch.lengths, *chunks)
  np.testing.assert_array_equal(found['mask'], expected.mask)
  mask = np.asarray(expected.mask)
  for name in ('frames', 'log_probs'):
    ours = np.asarray(found[name])[mask]
    theirs = np.asarray(getattr(expected, name))[mask]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - ours[:1]).max() > 1e-2  # or all frames are alike


def test_a_stream(made):
  """Chunk by chunk it is the masked pass, beside streams without a chunk."""
  recognizer, programs, _ = made
  heard, expected = _encode(recognizer, _CHUNK, _LEFT)
  total = int(np.asarray(expected.mask)[0].sum())
  step = _CHUNK * programs.index['input_frames_per_frame']
  size = programs.index['chunk_input_frames']
  cache = programs.init_cache(3)
  count = np.array([_CHUNK, 0, 0])
  for first in range(0, total - _CHUNK + 1, _CHUNK):
    start = first // _CHUNK * step
    window = np.stack([heard.features[0, start : start + size]] * 3)
    found, cache = programs.encode_chunk(window, count, cache)
    np.testing.assert_allclose(
      found['log_probs'][0],
      expected.log_probs[0, first : first + _CHUNK],
      rtol=1e-4,
      atol=1e-4,
    )
  assert cache['offset'].tolist() == [first + _CHUNK, 0, 0]
  # What was heard matters: without it the last chunk is another.
  alone, _ = programs.encode_chunk(window, count, programs.init_cache(3))
  assert np.abs(alone['log_probs'][0] - found['log_probs'][0]).max() > 1e-3


def test_a_difference_would_be_seen(made):
  """The check that the script prints sees wrong parameters."""
  _, programs, folder = made
  found = directory.find(folder / 'fast', for_decoding=True)
  arrays = exporting._taken(*directory.restore(found))
  path = 'params/ctc/bias'
  wrong = {**arrays, path: arrays[path].at[1].add(1.0)}
  source = exporting._Source(found.description, wrong, _CHUNK, _LEFT)
  assert exporting.compare(programs, source) > 1e-2


def test_running_needs_no_model_code():
  code = (
    'import sys, u2moe_jax.decoding.exported\n'
    "bad = ('u2moe_jax.models', 'u2moe_jax.layers', 'u2moe_jax.config')\n"
    'assert not [m for m in sys.modules if m.startswith(bad)]\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_bad_input_is_named(made, tmp_path):
  _, _, folder = made
  with pytest.raises(contents.CheckpointError, match=r'programs.json: No such'):
    exported.Programs(tmp_path)
  index = json.loads((folder / 'programs' / 'programs.json').read_text())
  for change, message in (
    ({'format_version': 9}, 'format version 9'),
    ({'platform': 'tpu'}, 'exported for tpu'),
  ):
    (tmp_path / 'programs.json').write_text(json.dumps(index | change))
    with pytest.raises(contents.CheckpointError, match=message):
      exported.Programs(tmp_path)
  with pytest.raises(contents.CheckpointError, match='holds no exported'):
    exporting.export(folder / 'fast', folder / 'model')
  with pytest.raises(recognizer_lib.DecodeError, match='positive chunk'):
    exporting.export(folder / 'fast', tmp_path / 'x', chunk_size=-1)
  (tmp_path / 'encode.bin').write_bytes(b'nonsense')
  with pytest.raises(contents.CheckpointError, match='no exported program'):
    exported._load(tmp_path / 'encode.bin')
