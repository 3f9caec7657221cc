"""TFDS data sets with sound and text, in a file format with random access.

`tfds:NAME:SPLIT`, NAME as for `tfds.load` (`librispeech`, `my_set/config`,
`my_set:1.0.0`), looked for where TFDS keeps its data (TFDS_DATA_DIR, else
~/tensorflow_datasets), or the folder of a version. The set must have been
prepared with file_format='array_record'. `@RATE` behind NAME gives the sample
rate where the set does not tell it.

TensorFlow is needed only by sets whose features need it, as
`tfds.features.Audio` does; `prepare_corpus` copies such a set into one that
needs it no more.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import io
import os
import pathlib
import re
from typing import Any

from jaxtyping import Float
import numpy as np
import soundfile

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines.corpora import keyed_lines
from u2moe_jax.frontend import audio

# Names of features in use, the likeliest first.
_SOUNDS = ('audio', 'speech', 'waveform', 'sound', 'array')
_TEXTS = ('txt', 'text', 'transcription', 'transcript', 'sentence')
_KEYS = ('key', 'id', 'utterance_id', 'audio_id')
_RATES = ('sample_rate', 'sampling_rate')
_SPEAKERS = ('speaker', 'speaker_id')

_RATED = re.compile('(.+)@([0-9]+)')
_SPLIT = re.compile(r'(.+):([A-Za-z_][^:/]*)')  # and not a version


def find_splits(path: str) -> list[str]:
  """Lists the splits of a set; only that of `path` if it names one."""
  name, split, _ = _parse(path, '')
  found = [] if split else list(_builder(name).info.splits)
  return found if 'train' in found else ['train']


def open_corpus(
  path: str, *, split: str, sample_rate: int, tolerant: bool
) -> sources.Source:
  """Opens one split of a set."""
  del tolerant
  name, split, rate = _parse(path, split)
  return TfdsSource(name, split, rate=rate, sample_rate=sample_rate)


def _parse(path: str, split: str) -> tuple[str, str, int | None]:
  """Name, split and given sample rate."""
  if not pathlib.Path(path).exists():
    match = _SPLIT.fullmatch(path)
    if match:
      path, split = match.groups()
  rated = _RATED.fullmatch(path)
  if rated:
    return rated[1], split, int(rated[2])
  return path, split, None


def _builder(name: str) -> Any:
  """The set's builder, made from its files and not from its code."""
  import tensorflow_datasets as tfds  # takes half a second

  try:
    if pathlib.Path(name).is_dir():
      return tfds.builder_from_directory(name)
    return tfds.core.read_only_builder.builder_from_files(name)
  except ImportError as error:
    raise sources.SourceError(
      f'tfds:{name}: its features need TensorFlow: pip install tensorflow '
      f'({error.name or "not installed"} is missing)'
    ) from None
  except (
    tfds.core.DatasetNotFoundError,
    OSError,  # no metadata in the folder
    ValueError,
  ) as error:
    folder = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    raise sources.SourceError(
      f'tfds:{name}: no such prepared data set in {folder} '
      f'({" ".join(str(error).split())[:150]}); download and prepare it once: '
      f"tfds.builder({name!r}, file_format='array_record')"
      '.download_and_prepare()'
    ) from None


class TfdsSource:
  """One split of a TFDS data set."""

  def __init__(
    self, name: str, split: str, *, rate: int | None, sample_rate: int
  ):
    """Looks at the features; reads no record.

    Args:
      name: of the set, or a folder.
      split: one of its splits.
      rate: of its sound in Hz, if the set does not tell it.
      sample_rate: Hz of what `load` gives.

    Raises:
      SourceError: if there is no such set, it has not been prepared, or it
        has no sound and text.
    """
    self._name, self._split = name, split
    self._rate: float | None = rate
    self._sample_rate = sample_rate
    features = _builder(name).info.features
    self._fields = _find_fields(name, features)
    if self._rate is None:
      self._rate = _find_rate(name, features, self._fields)
    self._data: Any = None
    self._latest: tuple[int, Mapping[str, Any]] = (-1, {})
    self._length = len(self._records())
    self.utterances: Sequence[manifest.Utterance] = manifest.OnDemand(
      len(self), self.describe
    )

  def __len__(self) -> int:
    return self._length

  def _records(self) -> Any:
    if self._data is None:
      self._data = _data_source(self._name, self._split)
    return self._data

  def record(self, index: int) -> Mapping[str, Any]:
    """The record as it is; reading it twice in turn costs nothing."""
    number, record = self._latest
    if number != index:
      record = self._records()[index]
      # A record is asked for its text and then for its sound.
      self._latest = (index, record)
    return record

  def describe(self, index: int) -> manifest.Utterance:
    """The utterance of a record."""
    record = self.record(index)
    key, txt, speaker = (
      _text(record, self._fields.get(part))
      for part in ('key', 'txt', 'speaker')
    )
    extra: dict[str, Any] = {'speaker': speaker} if speaker else {}
    key = key or f'{self._split}-{index:08d}'
    problem = None
    try:
      # It is in the record anyway, and nothing else tells how long it is.
      samples, rate = self._sound(record)
      extra['duration'] = len(samples) / rate
    except audio.AudioError as error:
      problem = manifest.Problem(error.reason, str(error))
    if problem is not None:
      return manifest.Utterance(key, '', txt, extra, problem)
    if '\ufffd' in txt:  # which stands for bytes that are no text
      problem = manifest.Problem('bad_encoding', f'{self}: {key!r}: not UTF-8')
    elif not txt.strip():
      problem = keyed_lines.no_text(key, self)
    return manifest.Utterance(key, '', txt, extra, problem)

  def _sound(self, record: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    value = _get(record, self._fields['audio'])
    # The file as it was, still encoded.
    if isinstance(value, bytes):
      try:
        return soundfile.read(io.BytesIO(value), dtype='float32')
      except soundfile.SoundFileError as error:
        raise audio.AudioError('unreadable', f'{self}: {error}') from None
    rate = self._rate or _get(record, self._fields['rate'])
    return _as_int16(np.asarray(value), str(self)), float(rate)

  def load(self, index: int) -> Float[np.ndarray, 'samples']:
    """See `sources.Source`."""
    utterance = sources.require_usable(self.describe(index))
    samples, rate = self._sound(self.record(index))
    return audio.as_mono(
      samples, rate, sample_rate=self._sample_rate, name=utterance.key
    )

  def header(self, index: int) -> audio.Header:
    """See `sources.Source`."""
    sources.require_usable(self.describe(index))
    samples, rate = self._sound(self.record(index))
    channels = samples.shape[1] if samples.ndim > 1 else 1
    return audio.Header(len(samples) / rate, rate, channels)

  def __str__(self) -> str:
    return f'tfds:{self._name}:{self._split}'

  def __getstate__(self) -> dict[str, Any]:
    # Open files do not travel.
    return {**self.__dict__, '_data': None, '_latest': (-1, {})}


def _data_source(name: str, split: str) -> Any:
  builder = _builder(name)
  known = builder.info.splits
  if split not in known:
    raise sources.SourceError(
      f'tfds:{name}: no split {split!r}; there is {", ".join(known)}'
    )
  try:
    return builder.as_data_source(split)
  except NotImplementedError:
    raise sources.SourceError(
      f'tfds:{name}: its file format has no random access; prepare it with '
      "file_format='array_record'"
    ) from None


# The names from the root of a record to one of its features.
_Path = tuple[str, ...]


def _find_fields(name: str, features: Mapping[str, Any]) -> dict[str, _Path]:
  """Finds the features by their names."""
  paths = list(_walk(features))
  wanted = {
    'audio': _SOUNDS,
    'txt': _TEXTS,
    'key': _KEYS,
    'rate': _RATES,
    'speaker': _SPEAKERS,
  }
  fields = {
    part: found
    for part, names in wanted.items()
    if (found := _first(paths, names)) is not None
  }
  for part, names in (('audio', _SOUNDS), ('txt', _TEXTS)):
    if part not in fields:
      raise sources.SourceError(
        f'tfds:{name}: none of its features is called {", ".join(names)}; '
        f'there is {", ".join("/".join(path) for path in paths)}'
      )
  return fields


def _find_rate(
  name: str, features: Mapping[str, Any], fields: Mapping[str, _Path]
) -> float | None:
  """The rate the sound's feature has; None if each record has its own."""
  feature = _get(features, fields['audio'])
  rate = getattr(feature, 'sample_rate', None)
  is_encoded = feature.np_dtype is np.object_  # the bytes of an audio file
  if rate is None and 'rate' not in fields and not is_encoded:
    raise sources.SourceError(
      f'tfds:{name}: does not tell its sample rate; give it as '
      f'tfds:{name}@16000'
    )
  return rate


def _walk(features: Mapping[str, Any], above: _Path = ()) -> Iterator[_Path]:
  for name, feature in features.items():
    if hasattr(feature, 'items'):
      yield from _walk(feature, (*above, name))
    else:
      yield (*above, name)


def _first(paths: Sequence[_Path], names: Sequence[str]) -> _Path | None:
  for name in names:
    for path in paths:
      if path[-1] == name:
        return path
  return None


def _get(record: Mapping[str, Any], path: _Path) -> Any:
  return functools.reduce(lambda node, name: node[name], path, record)


def _text(record: Mapping[str, Any], path: _Path | None) -> str:
  if path is None:
    return ''
  value = _get(record, path)
  if isinstance(value, bytes):
    return value.decode('utf-8', errors='replace')
  return str(value)


def _as_int16(samples: np.ndarray, name: str) -> np.ndarray:
  """Narrows the int64 that TFDS keeps 16-bit sound in."""
  if samples.dtype != np.int64:
    return samples
  limits = np.iinfo(np.int16)
  if samples.size and not (
    limits.min <= samples.min() and samples.max() <= limits.max
  ):
    raise audio.AudioError(
      'not_scaled', f'{name}: int64 samples beyond 16 bits; write it as int16'
    )
  return samples.astype(np.int16)
