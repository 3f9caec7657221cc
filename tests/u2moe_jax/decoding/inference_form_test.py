"""A recogniser from an optimised checkpoint says what the original says."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.reference import tiny_recognizer
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import mapped
from u2moe_jax.checkpoint import optimized
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import streaming

# Every mode compiles again what it needs; so one length of sound for all.
_SECONDS = 0.9


def _model_config():
  """Experts in one layer of each kind: they take most of the compiling."""
  moe = config_lib.MoeConfig(num_experts=3, where='0.final,ffn')
  config = tiny_recognizer.model_config()
  return dataclasses.replace(
    config,
    encoder=dataclasses.replace(config.encoder, moe=moe),
    decoder=dataclasses.replace(config.decoder, moe=moe),
  )


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  """A recogniser, and its model directory."""
  made = tiny_recognizer.make(_model_config(), nbest=3)
  folder = tmp_path_factory.mktemp('forms') / 'model'
  tokens = folder.parent / 'tokens'
  tokens.mkdir()
  units = ['<blank>', '<unk>', *'ABCDEFGHI', '<sos/eos>']
  lines = (f'{unit} {i}\n' for i, unit in enumerate(units))
  (tokens / 'units.txt').write_text(''.join(lines))
  directory.write(
    folder, made.description, made.params, made.buffers, tokens=tokens
  )
  return recognizer_lib.Recognizer.from_checkpoint(
    folder, config=made.config
  ), folder


def _optimized(original, weights='float32'):
  recognizer, folder = original
  out = folder.parent / weights
  if not out.is_dir():
    optimized.optimize(folder, out, weights=weights)
  return recognizer_lib.Recognizer.from_checkpoint(
    out, config=recognizer.config
  )


@pytest.fixture(scope='module')
def fast(original):
  return _optimized(original)


def _assert_same(ours, theirs):
  assert ours.text == theirs.text
  assert ours.times == theirs.times
  assert [a.text for a in ours.nbest] == [a.text for a in theirs.nbest]
  np.testing.assert_allclose(
    [a.score for a in ours.nbest], [a.score for a in theirs.nbest], rtol=1e-5
  )


@pytest.mark.parametrize('mode', ['attention_rescoring', 'attention'])
def test_text_and_scores_are_the_same(original, fast, mode):
  sound = tiny_recognizer.sounds([_SECONDS])
  theirs, ours = (
    tiny_recognizer.changed(each, mode=mode).transcribe_batch(sound)[0]
    for each in (original[0], fast)
  )
  _assert_same(ours, theirs)
  assert len({a.text for a in theirs.nbest}) > 1


def test_a_stream_is_the_masked_pass_of_the_original(original, fast):
  sound = tiny_recognizer.sounds([_SECONDS])[0]
  config = dataclasses.replace(
    fast.config, mode='ctc_prefix_beam_search', chunk_size=4, left_chunks=2
  )
  stream = streaming.Stream(fast.with_config(config))
  for piece in np.array_split(sound, 5):
    stream.accept(piece)
  masked = original[0].with_config(config).transcribe_batch([sound])[0]
  _assert_same(stream.finish(), masked)


def test_its_parameters_are_where_the_file_is_mapped(original, fast):
  views = mapped.read(original[1].parent / 'float32' / 'params')
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(fast.params)]
  assert all(pointer % mapped.ALIGNMENT == 0 for pointer in pointers)
  # Next to each other, as in the file: nothing was copied elsewhere.
  size = sum(view.nbytes + mapped.ALIGNMENT for view in views.values())
  assert max(pointers) - min(pointers) < size


def test_8_bits_are_nearly_as_good(original):
  weights = 'int8'
  narrow = _optimized(original, weights)
  sound = tiny_recognizer.sounds([_SECONDS])
  ours, theirs = (
    tiny_recognizer.changed(each, mode='ctc_greedy_search')
    .transcribe_batch(sound)[0]
    .score
    for each in (narrow, original[0])
  )
  assert 0 < abs(ours - theirs) < 0.2 * abs(theirs)
  arrays = mapped.read(original[1].parent / weights / 'params')
  assert weights in {array.dtype.name for array in arrays.values()}
  # Whoever decodes with it is told.
  found = directory.find(original[1].parent / weights, for_decoding=True)
  assert f'inference form ({weights})' in found.choice


def test_the_directory_says_what_it_is(original, fast):
  recognizer, folder = original
  out = folder.parent / 'float32'
  assert fast.tokenizer is not None
  assert fast.description.form == 'inference'
  assert fast.description.model == recognizer.description.model
  assert str(folder) in fast.description.provenance['made_from']
  # The program that knew only the other form refuses this number.
  assert json.loads((out / 'model.json').read_text())['format_version'] == 2
  with pytest.raises(directory.CheckpointError, match='inference form'):
    directory.find(out)
  assert 'inference form' in directory.find(out, for_decoding=True).choice
  with pytest.raises(directory.CheckpointError, match='inference form'):
    optimized.optimize(out, folder.parent / 'again')
  assert not (folder.parent / 'again').exists()
  with pytest.raises(directory.CheckpointError, match='the checkpoint itself'):
    optimized.optimize(folder, folder.parent / 'x' / '..' / folder.name)
  assert directory.find(folder).description.form == 'training'


def test_nothing_half_written_is_left(original, tmp_path, monkeypatch):
  def fail(*_):
    raise OSError('no space left')

  monkeypatch.setattr(mapped, 'write', fail)
  with pytest.raises(OSError, match='no space'):
    optimized.optimize(original[1], tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
