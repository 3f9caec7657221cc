"""The recogniser: same words alone, in any batch, and chunk by chunk."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from tests.reference import tiny_recognizer
from u2moe_jax import config as config_lib
from u2moe_jax.decoding import aligner
from u2moe_jax.decoding import batching
from u2moe_jax.decoding import programs
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import sessions
from u2moe_jax.decoding import streaming
from u2moe_jax.frontend import audio
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.text import tokenizer as tokenizer_lib

RATE = tiny_recognizer.RATE


@pytest.fixture(scope='module')
def recognizer():
  return tiny_recognizer.make(tiny_recognizer.model_config())


@pytest.mark.parametrize('mode', config_lib.DECODING_MODES)
def test_batch_mates_and_order_change_nothing(recognizer, mode):
  model = tiny_recognizer.changed(recognizer, mode=mode)
  sounds = tiny_recognizer.sounds([0.9, 0.5, 0.8, 0.6])
  together = model.transcribe_batch(sounds)
  backwards = model.transcribe_batch(sounds[::-1])[::-1]
  alone = model.transcribe_batch(sounds[:1])[0]
  assert [t.text for t in together] == [t.text for t in backwards]
  assert alone.text == together[0].text
  np.testing.assert_allclose(alone.score, together[0].score, atol=1e-4)
  assert len({t.score for t in together}) > 1  # or nothing was compared


def test_padding_changes_nothing(recognizer):
  features = [
    recognizer.features(s) for s in tiny_recognizer.sounds([0.9, 0.5])
  ]
  search = lambda frames, more=0: recognizer.search(
    dataclasses.replace(
      batch := batching.pad((0, 1), features, frames, 2, 20),
      lengths=batch.lengths + more,
    )
  )
  tight, loose = search(100), search(150)
  for ours, theirs in zip(tight, loose, strict=True):
    assert ours.text == theirs.text
    np.testing.assert_allclose(ours.score, theirs.score, atol=1e-4)
  # An encoder frame of padding that counts is heard.
  assert abs(search(100, 4)[1].score - tight[1].score) > 1e-3


@pytest.mark.parametrize('left_chunks', [-1, 2])
def test_streaming_is_the_masked_pass(recognizer, left_chunks):
  model = tiny_recognizer.changed(
    recognizer, chunk_size=4, left_chunks=left_chunks
  )
  sound = tiny_recognizer.sounds([1.13])[0]
  masked = model.transcribe(sound, sample_rate=RATE)
  stream = streaming.Stream(model)
  partials = [stream.accept(piece) for piece in np.array_split(sound, 7)]
  final = stream.finish()
  assert final.text == masked.text
  assert final.times == masked.times
  np.testing.assert_allclose(final.score, masked.score, atol=1e-4)
  assert sum(p.num_chunks for p in partials) >= 5
  # Another chunk size is another model: the comparison can fail.
  other = tiny_recognizer.changed(
    recognizer, chunk_size=16, left_chunks=left_chunks
  )
  assert other.transcribe(sound, sample_rate=RATE).score != masked.score


def test_how_sound_is_cut_changes_nothing(recognizer):
  model = tiny_recognizer.changed(recognizer, chunk_size=4, left_chunks=2)
  sound = tiny_recognizer.sounds([0.8])[0]

  def run(pieces):
    stream = streaming.Stream(model)
    for piece in np.array_split(sound, pieces):
      stream.accept(piece)
    return stream.finish()

  assert run(1) == run(11)


def test_room_grows_without_changing_words(recognizer, monkeypatch):
  model = tiny_recognizer.changed(recognizer, chunk_size=4)
  sound = tiny_recognizer.sounds([1.0])[0]

  def run():
    stream = streaming.Stream(model)
    stream.accept(sound)
    return stream.finish()

  large = run()
  monkeypatch.setattr(sessions, '_FIRST_ROOM', 8)
  assert run().text == large.text


def test_silence_shorter_than_a_window_is_empty(recognizer):
  model = tiny_recognizer.changed(recognizer, chunk_size=4, left_chunks=2)
  stream = streaming.Stream(model)
  stream.accept(np.zeros(200, np.float32))
  assert stream.finish().text == ''
  short = model.transcribe(np.zeros(200, np.float32), sample_rate=RATE)
  assert short.text == ''


def test_files_and_arrays_of_another_rate(recognizer, tmp_path):
  import soundfile

  sound = tiny_recognizer.sounds([0.5])[0]
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
    streaming.Stream(
      tiny_recognizer.changed(recognizer, chunk_size=4, mode='attention')
    )
  noncausal = tiny_recognizer.make(_noncausal(), chunk_size=4)
  with pytest.raises(error, match='non-causal'):
    streaming.Stream(noncausal)
  stream = streaming.Stream(
    tiny_recognizer.changed(recognizer, chunk_size=4, left_chunks=2)
  )
  with pytest.raises(error, match='8000'):
    stream.accept(np.zeros(10, np.float32), sample_rate=8000)
  with pytest.raises(audio.AudioError, match='finite'):
    stream.accept(np.full(10, np.nan, np.float32))
  stream.finish()
  with pytest.raises(error, match='finish'):
    stream.accept(np.zeros(10, np.float32))


def _noncausal():
  config = tiny_recognizer.model_config()
  encoder = dataclasses.replace(
    config.encoder, causal_conv=False, conv_kernel=5
  )
  return dataclasses.replace(config, encoder=encoder)


def test_a_mode_needs_its_decoder():
  config = tiny_recognizer.model_config()
  one_sided = dataclasses.replace(
    config, decoder=dataclasses.replace(config.decoder, num_reverse_blocks=0)
  )
  with pytest.raises(recognizer_lib.DecodeError, match='reverse_weight'):
    tiny_recognizer.make(one_sided)
  tiny_recognizer.make(one_sided, reverse_weight=0.0)
  ctc_only = dataclasses.replace(
    config,
    decoder=dataclasses.replace(
      config.decoder, num_blocks=0, num_reverse_blocks=0
    ),
  )
  with pytest.raises(recognizer_lib.DecodeError, match='attention decoder'):
    tiny_recognizer.make(ctc_only)


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
  drawn = tiny_recognizer.changed(plain, hotwords=str(words))
  (sound,) = tiny_recognizer.sounds([0.9])
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
    tiny_recognizer.changed(drawn, mode='ctc_greedy_search')
  with pytest.raises(recognizer_lib.DecodeError, match='token table'):
    tiny_recognizer.changed(recognizer, hotwords=str(words))


def test_devices_share_a_batch(recognizer):
  """Each takes some rows; the words are those of one device."""
  sounds = tiny_recognizer.sounds([0.9, 0.5, 0.8])
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
  transcript = recognizer.transcribe(
    tiny_recognizer.sounds([0.9])[0], sample_rate=RATE
  )
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
  greedy = tiny_recognizer.changed(recognizer, mode='ctc_greedy_search')
  words = greedy.transcribe(
    tiny_recognizer.sounds([0.9])[0], sample_rate=RATE
  ).words
  assert words
  assert words[0].confidence is None


def test_a_text_is_aligned_with_its_sound(recognizer):
  greedy = tiny_recognizer.changed(recognizer, mode='ctc_greedy_search')
  sounds = tiny_recognizer.sounds([0.9, 0.5])
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
    config_lib.DecodeConfig(**settings), tiny_recognizer.model_config(**encoder)
  )
  assert len(found) == len(words)
  assert all(word in line for word, line in zip(words, found, strict=True))


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('mode', 'beam'),
    ('beam', 0),
    ('nbest', 11),
    ('chunk_size', 0),
    ('left_chunks', -2),
    ('ctc_weight', -0.1),
    ('reverse_weight', 1.1),
    ('blank_penalty', float('inf')),
    ('length_penalty', float('nan')),
    ('whole_seconds', 0.0),
    ('batch_seconds', float('nan')),
  ],
)
def test_settings_out_of_range_are_named(key, value):
  with pytest.raises(config_lib.ConfigError, match=rf'decode\.{key}'):
    config_lib.DecodeConfig(**{key: value})


def test_a_long_recording_is_what_its_segments_are(recognizer, monkeypatch):
  """And nothing as long as the recording is ever encoded."""
  monkeypatch.setattr(recognizer_lib, '_WINDOW_SECONDS', 1.0)
  monkeypatch.setattr(recognizer_lib, '_EDGE_SECONDS', 0.2)
  monkeypatch.setattr(recognizer_lib, '_WINDOWS_AT_ONCE', 3)
  lengths = []
  encode = programs.encode

  def spy(model, params, buffers, features, *args, **kwargs):
    lengths.append(features.shape[1])
    return encode(model, params, buffers, features, *args, **kwargs)

  monkeypatch.setattr(programs, 'encode', spy)
  rules = config_lib.EndpointConfig(max_seconds=0.8)
  model = tiny_recognizer.changed(recognizer, whole_seconds=1.0, endpoint=rules)
  sound = np.tile(tiny_recognizer.sounds([1.3])[0], 3)
  whole = model.transcribe(sound, sample_rate=RATE)
  assert max(lengths) <= 140  # the padded length of a window
  cut = model.segments(sound)
  assert cut[0][0] == 0
  assert cut[-1][1] == len(sound)
  assert len(cut) >= 5
  for (_, end), (start, _) in itertools.pairwise(cut):
    assert 0 < end - start <= 800  # what the last frame of a segment reaches
  parts = [model.transcribe(sound[a:b], sample_rate=RATE) for a, b in cut]
  assert whole.text == ' '.join(part.text for part in parts if part.text)
  assert [span.text for span in whole.segments] == [part.text for part in parts]
  np.testing.assert_allclose(
    whole.score, sum(part.score for part in parts), atol=1e-3
  )
  starts = [word.start for word in whole.words]
  assert starts == sorted(starts)
  assert 3.0 < whole.words[-1].end <= 3.9
  short = model.transcribe_batch([sound, sound[:8000]])
  assert short[0].text == whole.text
  assert not short[1].segments
  # Without the rule the same recording is one pass.
  lengths.clear()
  plain = tiny_recognizer.changed(recognizer, whole_seconds=9.0)
  assert not plain.transcribe(sound, sample_rate=RATE).segments
  assert max(lengths) >= 388


@pytest.mark.parametrize('left_chunks', [1, -1])
def test_the_limit_of_left_context_is_kept(recognizer, left_chunks):
  """What lies further back than all layers together reach changes nothing."""
  config, chunk = recognizer.description.model.encoder, 4
  rng = np.random.default_rng(0)
  length = 4 * 47 + 7
  features = rng.normal(size=(1, length, 20)).astype(np.float32)

  def last_chunk(features):
    encoded = programs.encode(
      recognizer.model,
      recognizer.params,
      recognizer.buffers,
      features,
      np.array([length], np.int32),
      chunk_size=chunk,
      left_chunks=left_chunks,
      blank_penalty=0.0,
    )
    return np.asarray(encoded.log_probs)[0, 44:48]

  # A layer reaches a chunk back, from within its own chunk and through the
  # convolution; the subsampling two frames of features more.
  reach = config.num_blocks * (2 * chunk - 1 + config.conv_kernel - 1)
  far, near = features.copy(), features.copy()
  far[:, : 4 * (44 - reach)] += 3.0
  near[:, 4 * 43] += 3.0
  expected = last_chunk(features)
  moved = np.abs(last_chunk(far) - expected).max()
  assert (moved < 1e-5) == (left_chunks >= 0), moved
  assert np.abs(last_chunk(near) - expected).max() > 1e-3
