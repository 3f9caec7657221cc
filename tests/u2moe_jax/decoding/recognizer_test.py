"""The recogniser: same words alone, in any batch, and chunk by chunk."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.decoding import aligner
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import streaming
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import fbank
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.text import tokenizer as tokenizer_lib

RATE = 16000


def _model_config(**encoder):
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


def _recognizer(model_config, **decode):
  params = jax.tree_util.tree_map_with_path(
    _random, directory.abstract_variables(model_config)['params']
  )
  # Frames without CMVN are all alike; this gives words to compare.
  features = config_lib.FeatureConfig(num_mel_bins=20)
  frames = fbank.fbank(_sounds([1.0])[0], features)
  cmvn = {'mean': frames.mean(axis=0), 'istd': 2 / frames.std(axis=0)}
  decode = {'beam': 4, 'batch_seconds': 4.0, **decode}
  return recognizer_lib.Recognizer(
    directory.Description(model_config, features),
    params,
    {'cmvn': cmvn},
    config=config_lib.DecodeConfig(**decode),
  )


@pytest.fixture(scope='module')
def recognizer():
  return _recognizer(_model_config())


def _sounds(lengths, seed=0):
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
  rng = np.random.default_rng(zlib.crc32(names.encode()))
  values = rng.normal(size=leaf.shape) * (1.5 if 'kernel' in names else 0.3)
  fan_in = leaf.shape[-2] if leaf.ndim > 1 and 'kernel' in names else 1
  values = values / fan_in**0.5 + ('scale' in names)
  return jnp.asarray(values, leaf.dtype)


def _with(recognizer, **changes):
  return recognizer.with_config(
    dataclasses.replace(recognizer.config, **changes)
  )


@pytest.mark.parametrize('mode', config_lib.DECODING_MODES)
def test_batch_mates_and_order_change_nothing(recognizer, mode):
  model = _with(recognizer, mode=mode)
  sounds = _sounds([0.9, 0.5, 0.8, 0.6])
  together = model.transcribe_batch(sounds)
  backwards = model.transcribe_batch(sounds[::-1])[::-1]
  alone = model.transcribe_batch(sounds[:1])[0]
  assert [t.text for t in together] == [t.text for t in backwards]
  assert alone.text == together[0].text
  np.testing.assert_allclose(alone.score, together[0].score, atol=1e-4)
  assert len({t.score for t in together}) > 1  # or nothing was compared


@pytest.mark.parametrize('left_chunks', [-1, 2])
def test_streaming_is_the_masked_pass(recognizer, left_chunks):
  model = _with(recognizer, chunk_size=4, left_chunks=left_chunks)
  sound = _sounds([1.13])[0]
  masked = model.transcribe(sound, sample_rate=RATE)
  stream = streaming.Stream(model)
  partials = [stream.accept(piece) for piece in np.array_split(sound, 7)]
  final = stream.finish()
  assert final.text == masked.text
  assert final.times == masked.times
  np.testing.assert_allclose(final.score, masked.score, atol=1e-4)
  assert sum(p.num_chunks for p in partials) >= 5
  # Another chunk size is another model: the comparison can fail.
  other = _with(recognizer, chunk_size=16, left_chunks=left_chunks)
  assert other.transcribe(sound, sample_rate=RATE).score != masked.score


def test_how_sound_is_cut_changes_nothing(recognizer):
  model = _with(recognizer, chunk_size=4, left_chunks=2)
  sound = _sounds([0.8])[0]

  def run(pieces):
    stream = streaming.Stream(model)
    for piece in np.array_split(sound, pieces):
      stream.accept(piece)
    return stream.finish()

  assert run(1) == run(11)


def test_room_grows_without_changing_words(recognizer, monkeypatch):
  model = _with(recognizer, chunk_size=4)
  sound = _sounds([1.0])[0]

  def run():
    stream = streaming.Stream(model)
    stream.accept(sound)
    return stream.finish()

  large = run()
  monkeypatch.setattr(streaming, '_FIRST_ROOM', 8)
  assert run().text == large.text


def test_silence_shorter_than_a_window_is_empty(recognizer):
  model = _with(recognizer, chunk_size=4, left_chunks=2)
  stream = streaming.Stream(model)
  stream.accept(np.zeros(200, np.float32))
  assert stream.finish().text == ''
  short = model.transcribe(np.zeros(200, np.float32), sample_rate=RATE)
  assert short.text == ''


def test_files_and_arrays_of_another_rate(recognizer, tmp_path):
  import soundfile

  sound = _sounds([0.5])[0]
  soundfile.write(tmp_path / 'a.wav', sound, RATE, subtype='FLOAT')
  from_file = recognizer.transcribe(tmp_path / 'a.wav')
  assert from_file == recognizer.transcribe(sound, sample_rate=RATE)
  recognizer.transcribe(sound[::2], sample_rate=8000)
  with pytest.raises(audio.AudioError, match='sample_rate'):
    recognizer.transcribe(sound)


def test_requests_that_cannot_be_served_say_why(recognizer):
  error = recognizer_lib.DecodeError
  with pytest.raises(error, match='chunk'):
    streaming.Stream(recognizer)
  with pytest.raises(error, match='cannot stream'):
    streaming.Stream(_with(recognizer, chunk_size=4, mode='attention'))
  noncausal = _recognizer(_noncausal(), chunk_size=4)
  with pytest.raises(error, match='non-causal'):
    streaming.Stream(noncausal)
  stream = streaming.Stream(_with(recognizer, chunk_size=4, left_chunks=2))
  with pytest.raises(error, match='8000'):
    stream.accept(np.zeros(10, np.float32), sample_rate=8000)
  with pytest.raises(audio.AudioError, match='finite'):
    stream.accept(np.full(10, np.nan, np.float32))
  stream.finish()
  with pytest.raises(error, match='finish'):
    stream.accept(np.zeros(10, np.float32))


def _noncausal():
  config = _model_config()
  encoder = dataclasses.replace(
    config.encoder, causal_conv=False, conv_kernel=5
  )
  return dataclasses.replace(config, encoder=encoder)


def test_a_mode_needs_its_decoder():
  config = _model_config()
  one_sided = dataclasses.replace(
    config, decoder=dataclasses.replace(config.decoder, num_reverse_blocks=0)
  )
  with pytest.raises(recognizer_lib.DecodeError, match='reverse_weight'):
    _recognizer(one_sided)
  _recognizer(one_sided, reverse_weight=0.0)
  ctc_only = dataclasses.replace(
    config,
    decoder=dataclasses.replace(
      config.decoder, num_blocks=0, num_reverse_blocks=0
    ),
  )
  with pytest.raises(recognizer_lib.DecodeError, match='attention decoder'):
    _recognizer(ctc_only)


def test_hotwords_draw_a_stream_as_they_draw_the_whole(recognizer, tmp_path):
  words = tmp_path / 'words.txt'
  words.write_text('cba\t9\nde\n', encoding='utf-8')
  plain = recognizer_lib.Recognizer(
    recognizer.description,
    recognizer.params,
    recognizer.buffers,
    tokenizer=tokenizer_lib.build_char_tokenizer(['abcdefghi']),
    config=dataclasses.replace(
      recognizer.config,
      mode='ctc_prefix_beam_search',
      chunk_size=4,
      left_chunks=2,
    ),
  )
  drawn = _with(plain, hotwords=str(words))
  (sound,) = _sounds([0.9])
  whole = drawn.transcribe(sound, sample_rate=RATE)
  assert 'cba' in whole.text
  assert 'cba' not in plain.transcribe(sound, sample_rate=RATE).text
  stream = streaming.Stream(drawn)
  for piece in np.array_split(sound, 5):
    stream.accept(piece)
  final = stream.finish()
  assert final.text == whole.text
  np.testing.assert_allclose(final.score, whole.score, atol=1e-3)
  with pytest.raises(recognizer_lib.DecodeError, match='takes no hotwords'):
    _with(drawn, mode='ctc_greedy_search')
  with pytest.raises(recognizer_lib.DecodeError, match='token table'):
    _with(recognizer, hotwords=str(words))


def test_devices_share_a_batch(recognizer):
  """Each takes some rows; the words are those of one device."""
  sounds = _sounds([0.9, 0.5, 0.8])
  mesh = mesh_lib.make_mesh(config_lib.MeshConfig(), jax.devices()[:2])
  shared = recognizer_lib.Recognizer(
    recognizer.description,
    recognizer.params,
    recognizer.buffers,
    config=recognizer.config,
    mesh=mesh,
  )
  features = [shared.features(sound) for sound in sounds]
  batch = next(shared.batches(features))
  assert batch.features.shape[0] % 2 == 0
  assert len(shared.encode(batch).frames.sharding.device_set) == 2
  for ours, alone in zip(
    shared.transcribe_batch(sounds),
    recognizer.transcribe_batch(sounds),
    strict=True,
  ):
    assert ours.text == alone.text
    np.testing.assert_allclose(ours.score, alone.score, atol=1e-4)


def test_words_have_times_and_confidences(recognizer):
  transcript = recognizer.transcribe(_sounds([0.9])[0], sample_rate=RATE)
  assert transcript.tokens
  assert [word.text for word in transcript.words] == transcript.text.split()
  starts = [word.start for word in transcript.words]
  assert starts == sorted(starts)
  assert all(word.start < word.end <= 0.9 for word in transcript.words)
  # Without a token table every token is a word.
  for word, share in zip(
    transcript.words, transcript.token_confidence, strict=True
  ):
    np.testing.assert_allclose(word.confidence, share, rtol=1e-5)
  greedy = _with(recognizer, mode='ctc_greedy_search')
  words = greedy.transcribe(_sounds([0.9])[0], sample_rate=RATE).words
  assert words
  assert words[0].confidence is None


def test_a_text_is_aligned_with_its_sound(recognizer):
  greedy = _with(recognizer, mode='ctc_greedy_search')
  sounds = _sounds([0.9, 0.5])
  heard = greedy.transcribe_batch(sounds)
  labels = [list(each.tokens) for each in heard]
  assert len(labels[0]) > 2
  batches = list(greedy.batches([greedy.features(s) for s in sounds]))
  found = {}
  for batch in batches:
    rows = aligner.align(greedy, batch, [labels[i] for i in batch.indices])
    found |= dict(zip(batch.indices, rows, strict=True))
  for index, each in found.items():
    # What is most probable frame by frame is its own best alignment.
    assert each.problem is None
    np.testing.assert_allclose(each.score, heard[index].score, atol=1e-4)
    assert [int(token.text) for token in each.tokens] == labels[index]
    assert [word.text for word in each.words] == heard[index].text.split()
    ends = [token.end for token in each.tokens]
    assert ends == sorted(ends)
  wrong = aligner.align(greedy, batches[0], [[1, 2, 1]])[0]
  assert wrong.score < found[batches[0].indices[0]].score
  long = aligner.align(greedy, batches[0], [[1, 1] * 40])[0]
  assert '80 tokens, 79 of them repeated, need 159 frames' in long.problem
  assert not long.tokens
  assert aligner.encode_text(greedy, '3 x')[1].startswith('no token table')
  assert aligner.encode_text(greedy, '')[1] == 'the text has no tokens'
  assert aligner.encode_text(greedy, '3 4') == ([3, 4], None)


@pytest.mark.parametrize(
  ('encoder', 'settings', 'words'),
  [
    ({}, {'chunk_size': 16}, []),
    ({}, {'chunk_size': 26}, ['chunks of 1 to 25']),
    ({}, {'chunk_size': 16, 'left_chunks': 4}, ['use_dynamic_left_chunk']),
    (
      {'use_dynamic_left_chunk': True},
      {'chunk_size': 16, 'left_chunks': 4},
      [],
    ),
    ({'use_dynamic_chunk': False}, {'chunk_size': 8}, ['full context only']),
    ({'use_dynamic_chunk': False}, {}, []),
    (
      {'use_dynamic_chunk': False, 'static_chunk_size': 8},
      {},
      ['chunks of 8 frames only'],
    ),
    (
      {'use_dynamic_chunk': False, 'static_chunk_size': 8},
      {'chunk_size': 8, 'left_chunks': 0},
      ['use_dynamic_left_chunk'],
    ),
  ],
)
def test_what_a_model_was_never_trained_for_is_said(encoder, settings, words):
  found = recognizer_lib.cautions(
    config_lib.DecodeConfig(**settings), _model_config(**encoder)
  )
  assert len(found) == len(words)
  assert all(word in line for word, line in zip(words, found, strict=True))
