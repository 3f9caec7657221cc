"""The built-in corpus: sentences of the grammar, spoken by espeak-ng.

The engine comes with the package `espeakng-loader` (GPL-3), is called through
ctypes, and is needed for nothing else.

For one seed, every utterance is the same samples, whatever was spoken before
it in the same process: the engine keeps its state in C globals (phases, noise,
an echo buffer) that none of its calls resets, so each utterance gets a freshly
loaded library, which costs half a millisecond, and a reseeded C `rand`.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import ctypes
import dataclasses
import itertools
import multiprocessing
import os
from typing import Any
from typing import Literal

from jaxtyping import Float
from jaxtyping import Int16
import numpy as np

from data_pipelines import tfds_dataset
from data_pipelines.corpora import grammar
from u2moe_jax.frontend import audio

Split = Literal['train', 'dev', 'test']
SAMPLE_RATE = 16000

# The engine's English accents, but for two: the Shavian one reads another
# alphabet, and in the West Midlands the letter E sounds like A elsewhere.
ACCENTS = {
  'en-gb': 'gmw/en',
  'en-us': 'gmw/en-US',
  'en-gb-scotland': 'gmw/en-GB-scotland',
  'en-029': 'gmw/en-029',
  'en-gb-x-rp': 'gmw/en-GB-x-rp',
  'en-gb-x-gbclan': 'gmw/en-GB-x-gbclan',
  'en-us-nyc': 'gmw/en-US-nyc',
}
# Variants of the timbre that sound like people: no whispers, croaks or robots,
# and none with the engine's `breath`, whose noise differs between processes.
VARIANTS = (
  *('m1', 'm2', 'm3', 'm4', 'm5', 'm6', 'm7', 'm8', 'f1', 'f4'),
  *('adam', 'boris', 'david', 'edward', 'Mario', 'Nguyen', 'paul', 'quincy'),
  *('Andrea', 'Annie', 'aunty', 'belinda', 'linda', 'steph'),
)
# Variants that training never hears, with any accent.
UNSEEN_VARIANTS = {'dev': ('Denis', 'shelby'), 'test': ('rob', 'grandma')}
# Of the pairs of accent and variant, one in eight goes to dev, one to test.
_DEAL = 8
_DEALT = {'dev': 0, 'test': _DEAL // 2}

_NOISES = ('white', 'pink', 'brown', 'babble')
_EXPONENTS = {'white': 0.0, 'pink': 1.0, 'brown': 2.0}
_NOISY_SHARE = 0.5
_BABBLE_VOICES = 5
_SNR_DB = (5.0, 30.0)
_PEAK_DB = (-14.0, -1.0)
_SILENCE_SECONDS = (0.1, 0.3)
_WORDS_PER_MINUTE = (110, 170)
_PITCH = (30, 70)
_PITCH_RANGE = (30, 70)
# What is quieter than this share of the peak, before the first and after the
# last word, is cut off.
_SILENCE_LEVEL = 0.002
_SPLIT_IDS: dict[str, int] = {'train': 0, 'dev': 1, 'test': 2}

# From the engine's C header, speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_RATE, _PITCH_PARAMETER, _RANGE_PARAMETER = 1, 3, 4
_CHARACTERS_UTF8 = 1


class EngineError(ValueError):
  """The speech engine is missing or refuses; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Style:
  """How a sentence is spoken.

  Attributes:
    accent: a key of `ACCENTS`.
    variant: timbre, one of the engine's voice variants.
    rate: words per minute.
    pitch: 0 to 100, 50 is the variant's own.
    pitch_range: 0 to 100, 50 is the variant's own.
  """

  accent: str
  variant: str
  rate: int = 165
  pitch: int = 50
  pitch_range: int = 50

  @property
  def voice(self) -> str:
    """Name of the speaker."""
    return f'{self.accent}+{self.variant}'


@dataclasses.dataclass(frozen=True)
class Script:
  """One utterance before it is spoken.

  Attributes:
    key: its name.
    txt: what to say.
    style: how to say it.
    noise: white, pink, brown or babble; None for clean speech.
    snr: speech over noise in dB; None for clean speech.
    seed: where the chance in its noise, silence and level comes from.
  """

  key: str
  txt: str
  style: Style
  noise: str | None
  snr: float | None
  seed: tuple[int, ...]


def voices(split: Split) -> list[tuple[str, str]]:
  """Returns the (accent, variant) pairs of a split; splits share none."""
  dealt = []
  for index, (variant, (a, accent)) in enumerate(
    itertools.product(VARIANTS, enumerate(ACCENTS))
  ):
    # Going along a diagonal, every split gets all accents and most variants.
    hand = (index // len(ACCENTS) + a) % _DEAL
    owner = next((s for s, h in _DEALT.items() if h == hand), 'train')
    if owner == split:
      dealt.append((accent, variant))
  unseen = UNSEEN_VARIANTS.get(split, ())
  return dealt + list(itertools.product(ACCENTS, unseen))


def write_scripts(
  *,
  seed: int = 0,
  num_train: int = 4000,
  num_dev: int = 300,
  num_test: int = 300,
) -> dict[Split, list[Script]]:
  """Decides everything about the corpus but the samples.

  Args:
    seed: where chance comes from.
    num_train: utterances to train on.
    num_dev: utterances to choose checkpoints by.
    num_test: utterances to report on.

  Returns:
    The scripts of each split. No sentence occurs twice, in any split.
  """
  counts: dict[Split, int] = {
    'test': num_test,
    'dev': num_dev,
    'train': num_train,
  }
  seen: set[str] = set()
  scripts: dict[Split, list[Script]] = {}
  # Test comes first: it stays the same whatever the size of the others, and
  # keeps the grammar's natural mix, short sentences included.
  for split, count in counts.items():
    rng = np.random.default_rng([seed, _SPLIT_IDS[split]])
    texts = grammar.sentences(rng, count, exclude=seen)
    seen.update(texts)
    scripts[split] = _cast(split, texts, seed, rng)
  return scripts


def _cast(
  split: Split, texts: Sequence[str], seed: int, rng: np.random.Generator
) -> list[Script]:
  """Gives every sentence a voice and a noise; each voice speaks as often."""
  pairs = voices(split)
  rng.shuffle(pairs)
  scripts = []
  for index, txt in enumerate(texts):
    style = _draw_style(*pairs[index % len(pairs)], rng)
    noise, snr = _draw_noise(rng)
    own_seed = (seed, _SPLIT_IDS[split], index)
    key = f'{split}-{index:05d}'
    scripts.append(Script(key, txt, style, noise, snr, own_seed))
  return scripts


def _draw_style(accent: str, variant: str, rng: np.random.Generator) -> Style:
  return Style(
    accent,
    variant,
    rate=int(rng.integers(*_WORDS_PER_MINUTE, endpoint=True)),
    pitch=int(rng.integers(*_PITCH, endpoint=True)),
    pitch_range=int(rng.integers(*_PITCH_RANGE, endpoint=True)),
  )


def _draw_noise(rng: np.random.Generator) -> tuple[str | None, float | None]:
  if rng.random() >= _NOISY_SHARE:
    return None, None
  noise = _NOISES[rng.integers(len(_NOISES))]
  return noise, round(float(rng.uniform(*_SNR_DB)), 1)


def build(
  *,
  seed: int = 0,
  num_train: int = 4000,
  num_dev: int = 300,
  num_test: int = 300,
  num_workers: int | None = None,
) -> Iterator[tuple[Split, tfds_dataset.Recording]]:
  """Speaks the corpus.

  Args:
    seed: where chance comes from.
    num_train: utterances to train on.
    num_dev: utterances to choose checkpoints by.
    num_test: utterances to report on.
    num_workers: processes; None for one a core, 0 for none but this one. The
      result does not depend on it.

  Yields:
    The split and the recording of each utterance: train, then dev, then test.

  Raises:
    EngineError: if the engine's package is not installed.
  """
  scripts = write_scripts(
    seed=seed, num_train=num_train, num_dev=num_dev, num_test=num_test
  )
  require_engine()  # says at once, and not in a worker, what is missing
  order: tuple[Split, ...] = ('train', 'dev', 'test')
  todo = [(split, script) for split in order for script in scripts[split]]
  recordings = _record_all([script for _, script in todo], num_workers)
  for (split, _), recording in zip(todo, recordings, strict=True):
    yield split, recording


def _record_all(
  scripts: Sequence[Script], num_workers: int | None
) -> Iterator[tfds_dataset.Recording]:
  if num_workers is None:
    num_workers = os.cpu_count() or 1
  if num_workers == 0:
    yield from map(record, scripts)
    return
  # Spawned and not forked: the parent may hold threads, JAX's among them.
  with multiprocessing.get_context('spawn').Pool(num_workers) as pool:
    yield from pool.imap(record, scripts, chunksize=8)


def record(script: Script) -> tfds_dataset.Recording:
  """Speaks one script, adds silence and noise, sets the level."""
  rng = np.random.default_rng([*script.seed, 1])
  speech = _say(script.txt, script.style)
  before, after = (
    int(SAMPLE_RATE * rng.uniform(*_SILENCE_SECONDS)) for _ in '12'
  )
  samples = np.pad(speech, (before, after))
  if script.noise is not None and script.snr is not None:
    power = np.mean(np.square(speech)) / 10 ** (script.snr / 10)
    samples = samples + np.sqrt(power) * _noise(script.noise, len(samples), rng)
  peak = 10 ** (rng.uniform(*_PEAK_DB) / 20)
  samples = samples * (peak / np.abs(samples).max())
  pcm = np.round(samples * np.iinfo(np.int16).max).astype(np.int16)
  return tfds_dataset.Recording(
    script.key, script.txt, pcm, SAMPLE_RATE, describe(script)
  )


def describe(script: Script) -> dict[str, Any]:
  """What is known of a script besides its text."""
  return {
    'speaker': script.style.voice,
    'noise': script.noise,
    'snr': script.snr,
  }


def _say(text: str, style: Style) -> Float[np.ndarray, 'samples']:
  """Speaks, resamples to `SAMPLE_RATE` and cuts off silence at both ends."""
  pcm, rate = synthesize(text, style)
  samples = audio.resample((pcm / 32768).astype(np.float32), rate, SAMPLE_RATE)
  loud = np.flatnonzero(
    np.abs(samples) > _SILENCE_LEVEL * np.abs(samples).max()
  )
  return samples[loud[0] : loud[-1] + 1].astype(np.float64)


def _noise(
  kind: str, num_samples: int, rng: np.random.Generator
) -> Float[np.ndarray, 'samples']:
  """Returns noise of mean power 1."""
  if kind == 'babble':
    noise = _babble(num_samples, rng)
  else:
    noise = _coloured(num_samples, _EXPONENTS[kind], rng)
  return noise / np.sqrt(np.mean(np.square(noise)))


def _coloured(
  num_samples: int, exponent: float, rng: np.random.Generator
) -> Float[np.ndarray, 'samples']:
  """Returns noise whose power falls as 1 / frequency ** exponent."""
  spectrum = np.fft.rfft(rng.standard_normal(num_samples))
  frequencies = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE)
  # Flat below 50 Hz, or nearly all power would go where nothing is heard.
  spectrum *= np.maximum(frequencies, 50.0) ** (-exponent / 2)
  return np.fft.irfft(spectrum, num_samples)


def _babble(
  num_samples: int, rng: np.random.Generator
) -> Float[np.ndarray, 'samples']:
  """Returns several voices of the training split at once."""
  pairs = voices('train')
  total = np.zeros(num_samples)
  for text in grammar.sentences(rng, _BABBLE_VOICES):
    style = _draw_style(*pairs[rng.integers(len(pairs))], rng)
    talk = _say(text, style)
    # A voice begins anywhere in its sentence, and is repeated to the end.
    talk = np.roll(talk, rng.integers(len(talk)))
    total += np.resize(talk / np.sqrt(np.mean(np.square(talk))), num_samples)
  return total


def synthesize(
  text: str, style: Style
) -> tuple[Int16[np.ndarray, 'samples'], int]:
  """Speaks a text of upper-case words.

  Args:
    text: words of the grammar; a word of one letter is a letter's name.
    style: voice, rate and pitch.

  Returns:
    Samples and their rate in Hz, as the engine gives them. The same arguments
    give the same samples, whatever was spoken before.

  Raises:
    EngineError: if the engine is missing or does not know the voice.
  """
  with _loaded_engine() as (engine, rate):
    name = f'{ACCENTS[style.accent]}+{style.variant}'
    if engine.espeak_SetVoiceByName(name.encode()) != 0:
      raise EngineError(f'espeak-ng does not know the voice {name}')
    engine.espeak_SetParameter(_RATE, style.rate, 0)
    engine.espeak_SetParameter(_PITCH_PARAMETER, style.pitch, 0)
    engine.espeak_SetParameter(_RANGE_PARAMETER, style.pitch_range, 0)
    return _speak(engine, _spoken_form(text)), rate


def _spoken_form(text: str) -> str:
  """Writes a text as the engine reads it aloud rightly.

  It takes a lone A for the article; EH is how it names the letter.
  """
  return ' '.join('eh' if w == 'A' else w.lower() for w in text.split())


def _speak(engine: Any, text: str) -> Int16[np.ndarray, 'samples']:
  """Speaks with what is set in the engine, and gathers the samples."""
  pieces: list[np.ndarray] = []

  def receive(samples: Any, count: int, _: Any) -> int:
    if samples and count > 0:
      # Copied: the engine's buffer is gone when the callback returns.
      pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
    return 0

  # Held in a variable until the end: ctypes would let go of it.
  callback = _callback_type()(receive)
  engine.espeak_SetSynthCallback(callback)
  data = text.encode() + b'\0'
  # (text, size, position, position type, end, flags, identifier, user data)
  error = engine.espeak_Synth(
    ctypes.c_char_p(data), ctypes.c_size_t(len(data)),
    0, 1, 0, _CHARACTERS_UTF8, None, None,
  )  # fmt: skip
  if error != 0 or engine.espeak_Synchronize() != 0 or not pieces:
    raise EngineError(f'espeak-ng did not speak {text!r} (error {error})')
  return np.concatenate(pieces)


def _callback_type() -> Any:
  # int callback(short* samples, int count, espeak_EVENT* events)
  return ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
  )


@contextlib.contextmanager
def _loaded_engine() -> Iterator[tuple[Any, int]]:
  """Loads the engine as if for the first time; gives it and its rate in Hz."""
  path, data = _library_path()
  ctypes.CDLL(None).srand(1)
  engine = ctypes.CDLL(path)
  try:
    rate = engine.espeak_Initialize(
      _AUDIO_OUTPUT_SYNCHRONOUS, 0, data.encode(), _DONT_EXIT
    )
    if rate <= 0:
      raise EngineError(f'espeak-ng does not start with its data in {data}')
    yield engine, rate
    engine.espeak_Terminate()
  finally:
    _unload(engine)
  _require_unloaded(path)


def _require_unloaded(path: str) -> None:
  """Refuses to go on with an engine that remembers what it has spoken."""
  try:
    # With this flag it opens only what is loaded already.
    held = ctypes.CDLL(path, mode=os.RTLD_NOLOAD)
  except OSError:
    return
  _unload(held)  # looking made one more handle
  raise EngineError(
    f'{path} stays loaded, so speech would depend on what was spoken before; '
    'something else in this process uses it'
  )


def _unload(library: ctypes.CDLL) -> None:
  ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))


def require_engine() -> None:
  """Raises EngineError if the engine's package is not installed."""
  _library_path()


def _library_path() -> tuple[str, str]:
  """Returns the paths of the engine's library and of its data."""
  try:
    import espeakng_loader  # a requirement of this corpus only
  except ImportError:
    raise EngineError(
      'the built-in corpus needs the speech engine espeak-ng: '
      'pip install espeakng-loader'
    ) from None
  return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
