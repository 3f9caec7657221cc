"""The built-in corpus: its promises, and the same samples every time."""

from collections import Counter
import contextlib
import ctypes
import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.corpora import espeak

_ROOT = pathlib.Path(__file__).parents[3]
_TEXT = 'TURN ON THE KITCHEN LIGHT'
# Accents agree on many a word; not on all of these.
_ACCENT_TEXT = 'THE FOURTH GARAGE AT HALF PAST THIRTY'
_SIZES = {'num_train': 6, 'num_dev': 2, 'num_test': 2}


@pytest.fixture(scope='module')
def scripts() -> dict[espeak.Split, list[espeak.Script]]:
  return espeak.write_scripts()


def _digest(script: espeak.Script) -> str:
  return hashlib.sha256(espeak.record(script).audio.tobytes()).hexdigest()


def _say(variant: str, text: str = _TEXT, **style) -> np.ndarray:
  return espeak.synthesize(text, espeak.Style('en-us', variant, **style))[0]


# What is promised.


def test_splits_share_no_voice():
  train, dev, test = (set(espeak.voices(s)) for s in ('train', 'dev', 'test'))
  assert len(train) >= 40
  assert min(len(dev), len(test)) >= 8
  assert len(train | dev | test) == len(train) + len(dev) + len(test)
  for split in (train, dev, test):
    assert {accent for accent, _ in split} == set(espeak.ACCENTS)


def test_dev_and_test_have_timbres_that_training_never_hears():
  heard = {variant for _, variant in espeak.voices('train')}
  for split in ('dev', 'test'):
    unheard = {variant for _, variant in espeak.voices(split)} - heard
    assert unheard == set(espeak.UNSEEN_VARIANTS[split])


def test_all_voices_exist_and_differ():
  variants = [*espeak.VARIANTS, *espeak.UNSEEN_VARIANTS['dev']]
  variants += espeak.UNSEEN_VARIANTS['test']
  sounds = [_say(v, _ACCENT_TEXT).tobytes() for v in variants]
  sounds += [
    espeak.synthesize(_ACCENT_TEXT, espeak.Style(a, 'm1'))[0].tobytes()
    for a in espeak.ACCENTS
  ]
  # en-us with m1 is in both lists.
  assert len(set(sounds)) == len(sounds) - 1


def test_unseen_sentences_of_well_known_words(scripts):
  texts = {split: [s.txt for s in scripts[split]] for split in scripts}
  assert [len(texts[s]) for s in ('train', 'dev', 'test')] == [4000, 300, 300]
  flat = [text for split in texts.values() for text in split]
  assert len(set(flat)) == len(flat)
  heard = Counter(word for text in texts['train'] for word in text.split())
  for split in ('dev', 'test'):
    words = {word for text in texts[split] for word in text.split()}
    assert min(heard[word] for word in words) >= 15


def test_voices_speak_equally_often_and_half_has_noise(scripts):
  for split, members in scripts.items():
    counts = Counter((s.style.accent, s.style.variant) for s in members)
    assert set(counts) == set(espeak.voices(split))
    assert max(counts.values()) - min(counts.values()) <= 1
    share = np.mean([s.noise is not None for s in members])
    assert abs(share - 0.5) < 0.1
    ratios = [s.snr for s in members if s.snr is not None]
    assert 5 <= min(ratios) < 7
    assert 28 < max(ratios) <= 30


def test_test_scripts_do_not_depend_on_the_size_of_the_rest(scripts):
  assert espeak.write_scripts(num_train=9, num_dev=3)['test'] == scripts['test']
  assert espeak.write_scripts(seed=1)['test'] != scripts['test']


def test_speech_is_as_long_as_its_rate_says():
  slow, fast = (len(_say('m1', rate=rate)) for rate in (120, 180))
  assert 1.2 < slow / fast < 1.7


def test_the_letter_a_is_not_the_article():
  # ˈeɪ is half as long again as ɐ, which the engine says for a bare "a".
  style = espeak.Style('en-us', 'm1')
  letter, _ = espeak.synthesize('B A B', style)
  with espeak._loaded_engine() as (engine, _):
    engine.espeak_SetVoiceByName(b'gmw/en-US+m1')
    engine.espeak_SetParameter(espeak._RATE, style.rate, 0)
    article = espeak._speak(engine, 'b a b')
  assert len(letter) > len(article) + 0.05 * 22050


# Samples.


def test_recording_has_level_silence_and_length(scripts):
  clean = next(s for s in scripts['train'] if s.noise is None)
  recording = espeak.record(clean)
  samples = recording.audio / 32768
  assert recording.audio.dtype == np.int16
  assert recording.sample_rate == 16000
  assert 10 ** (-14.1 / 20) < np.abs(samples).max() < 10 ** (-0.9 / 20)
  loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
  for silence in (loud[0], len(samples) - loud[-1]):
    assert 0.09 < silence / 16000 < 0.4
  assert recording.extra['speaker'] == clean.style.voice


@pytest.mark.parametrize('kind', ['white', 'pink', 'brown', 'babble'])
@pytest.mark.parametrize('snr', [5.0, 30.0])
def test_noise_has_the_ratio_it_says(kind, snr, monkeypatch):
  gathered = {}
  say, noise = espeak._say, espeak._noise
  # Babble speaks too; the first voice is the speaker's.
  monkeypatch.setattr(
    espeak, '_say', lambda *a: gathered.setdefault('speech', say(*a))
  )
  monkeypatch.setattr(espeak, '_PEAK_DB', (0.0, 0.0))

  def spy(*args):
    with monkeypatch.context() as undo:
      undo.setattr(espeak, '_say', say)
      gathered['noise'] = noise(*args)
    return gathered['noise']

  monkeypatch.setattr(espeak, '_noise', spy)
  style = espeak.Style('en-gb', 'm3')
  script = espeak.Script('k', _TEXT, style, kind, snr, (0, 0, 0))
  samples = espeak.record(script).audio.astype(float)
  # Least squares finds how much of the noise is in the recording.
  start = np.correlate(samples, gathered['speech'], 'valid').argmax()
  speech = np.zeros(len(samples))
  speech[start : start + len(gathered['speech'])] = gathered['speech']
  parts = np.stack([speech, gathered['noise']], axis=1)
  (a, b), *_ = np.linalg.lstsq(parts, samples, rcond=None)
  power = np.mean(np.square(gathered['speech']))
  assert 10 * np.log10(a**2 * power / b**2) == pytest.approx(snr, abs=0.1)


def test_noise_colours_fall_as_they_should():
  rng = np.random.default_rng(0)
  for kind, slope in (('white', 0), ('pink', -10), ('brown', -20)):
    power = np.abs(np.fft.rfft(espeak._noise(kind, 160000, rng))) ** 2
    low, high = (power[f * 10 : f * 20].mean() for f in (200, 2000))
    assert 10 * np.log10(high / low) == pytest.approx(slope, abs=1)


# The same every time.


def test_speech_does_not_depend_on_what_was_said_before():
  first = _say('m1')
  _say('f1', 'EIGHT NINE', rate=110, pitch=70)
  np.testing.assert_array_equal(_say('m1'), first)


def test_an_engine_that_stays_loaded_would_depend_on_it():
  """The negative control: the reload is what makes speech repeatable."""
  with espeak._loaded_engine() as (engine, _):
    engine.espeak_SetVoiceByName(b'gmw/en-US+m1')
    once, again = (espeak._speak(engine, _TEXT.lower()) for _ in range(2))
  assert once.tobytes() != again.tobytes()


def test_an_engine_in_other_hands_is_refused():
  library = ctypes.CDLL(espeak._library_path()[0])
  try:
    with pytest.raises(espeak.EngineError, match='stays loaded'):
      _say('m1')
  finally:
    espeak._unload(library)
  assert len(_say('m1'))


def test_every_noise_is_repeatable_in_any_order(scripts):
  chosen = {s.noise: s for s in scripts['train'][:60]}
  assert len(chosen) == 5
  forwards = {kind: _digest(s) for kind, s in chosen.items()}
  backwards = {kind: _digest(s) for kind, s in reversed(chosen.items())}
  assert forwards == backwards
  assert len(set(forwards.values())) == 5


def test_corpus_does_not_depend_on_workers_or_process():
  built = [list(espeak.build(num_workers=n, **_SIZES)) for n in (0, 2)]
  keys = [[(split, r.key) for split, r in pairs] for pairs in built]
  assert keys[0] == keys[1]
  assert [split for split, _ in keys[0]] == (
    ['train'] * 6 + ['dev'] * 2 + ['test'] * 2
  )
  sounds = [[r.audio.tobytes() for _, r in pairs] for pairs in built]
  assert sounds[0] == sounds[1]
  other = [r for _, r in espeak.build(seed=1, num_workers=0, **_SIZES)]
  assert sounds[0] != [r.audio.tobytes() for r in other]


def test_all_voices_are_the_same_in_another_process():
  code = (
    'import hashlib; from data_pipelines.corpora import espeak\n'
    'digest = hashlib.sha256()\n'
    'for split in ("train", "dev", "test"):\n'
    '  for accent, variant in espeak.voices(split):\n'
    '    style = espeak.Style(accent, variant)\n'
    '    text = "SIX CHEESE THAT FORGET"\n'
    '    digest.update(espeak.synthesize(text, style)[0].tobytes())\n'
    'print(digest.hexdigest())'
  )
  command = [sys.executable, '-c', code]
  run = subprocess.run(
    command, cwd=_ROOT, check=True, capture_output=True, text=True
  )
  printed = []
  with contextlib.redirect_stdout(None):
    exec(code, {'print': printed.append})
  assert printed == [run.stdout.strip()]


# What can go wrong.


def test_missing_engine_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'espeakng_loader', None)
  with pytest.raises(espeak.EngineError, match='pip install espeakng-loader'):
    next(espeak.build(num_workers=0, **_SIZES))


def test_unknown_voice_is_named(monkeypatch):
  monkeypatch.setitem(espeak.ACCENTS, 'moon', 'gmw/en-MOON')
  with pytest.raises(espeak.EngineError, match=r'voice gmw/en-MOON\+m1'):
    espeak.synthesize('ONE TWO', espeak.Style('moon', 'm1'))
