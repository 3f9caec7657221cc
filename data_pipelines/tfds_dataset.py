"""Prepared data sets: TFDS folders of ArrayRecord files, without TensorFlow.

A folder holds, for each split, int16 audio with its transcript, to be read in
any order, and `index-SPLIT.jsonl` with everything but the audio, so that
batches can be planned without opening it.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any
from typing import TextIO

from jaxtyping import Int16
import numpy as np

from data_pipelines import manifest

_NAME = 'speech'
_VERSION = '1.0.0'
_INFO_FILE = 'dataset_info.json'
_FILE_FORMAT = 'array_record'
# About 170 MB of audio of 3 s: files that are cheap to copy and to shard.
_RECORDS_PER_FILE = 2000


class DatasetError(ValueError):
  """A data set that cannot be read or written; the message names the folder."""


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
  """One utterance with its sound.

  Attributes:
    key: its name, unique within a split.
    txt: transcript.
    audio: int16 samples (num_samples,).
    sample_rate: their rate in Hz.
    extra: everything else that is known, ready for JSON.
  """

  key: str
  txt: str
  audio: Int16[np.ndarray, 'samples']
  sample_rate: int
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def duration(self) -> float:
    """Length in seconds."""
    return len(self.audio) / self.sample_rate


def write(
  folder: str | os.PathLike[str],
  recordings: Iterable[tuple[str, Recording]],
  *,
  finish: Callable[[pathlib.Path], None] | None = None,
) -> None:
  """Writes a data set; the folder appears when everything is in it.

  Until then the files are in `FOLDER.incomplete` beside it, which an error
  removes and the next `write` clears away.

  Args:
    folder: where to; replaced if it is there.
    recordings: (split, recording) pairs; their order within a split is kept.
    finish: called last, with the folder where the files are then, to add
      files of its own.

  Raises:
    DatasetError: for a key that a split has twice, or no recording at all.
  """
  folder = pathlib.Path(os.path.abspath(folder))
  staging = folder.with_name(f'{folder.name}.incomplete')
  shutil.rmtree(staging, ignore_errors=True)
  staging.mkdir(parents=True)
  try:
    _write_records(staging, recordings)
    if finish is not None:
      finish(staging)
    _replace_folder(staging, folder)
  finally:
    shutil.rmtree(staging, ignore_errors=True)


def _replace_folder(source: pathlib.Path, target: pathlib.Path) -> None:
  # A rename cannot replace a folder with files in it; the old one steps aside.
  old = target.with_name(f'{target.name}.replaced')
  shutil.rmtree(old, ignore_errors=True)
  if target.exists():
    os.rename(target, old)
  os.rename(source, target)
  shutil.rmtree(old, ignore_errors=True)


def _write_records(
  folder: pathlib.Path, recordings: Iterable[tuple[str, Recording]]
) -> None:
  writer = _make_writer(folder)
  indices: dict[str, TextIO] = {}
  keys: set[tuple[str, str]] = set()
  with contextlib.ExitStack() as files:
    for split, recording in recordings:
      if split not in indices:
        writer.initialize_splits([split])
        path = folder / _index_name(split)
        indices[split] = files.enter_context(path.open('w', encoding='utf-8'))
      if (split, recording.key) in keys:
        raise DatasetError(
          f'the key {recording.key!r} occurs twice in the split {split!r}; '
          'keys must be unique'
        )
      keys.add((split, recording.key))
      writer.add_examples({split: [_to_example(recording)]})
      indices[split].write(_index_line(recording))
  if not keys:
    raise DatasetError('there is no utterance to write')
  writer.close_all()


def _make_writer(folder: pathlib.Path) -> Any:
  import tensorflow_datasets as tfds  # takes half a second

  identity = tfds.core.dataset_info.DatasetIdentity(
    name=_NAME,
    version=tfds.core.Version(_VERSION),
    data_dir=os.fspath(folder),
    module_name=__name__,
  )
  features = tfds.features.FeaturesDict(
    {
      # As bytes: a list of varints would take ten bytes for a negative sample.
      'audio': tfds.features.Tensor(
        shape=(None,), dtype=np.int16, encoding='bytes'
      ),
      'sample_rate': tfds.features.Scalar(np.int32),
      'key': tfds.features.Text(),
      'txt': tfds.features.Text(),
      'extra': tfds.features.Text(),
    }
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description='Utterances with transcripts.',
    features=features,
    disable_shuffling=True,
  )
  return tfds.core.SequentialWriter(
    info, max_examples_per_shard=_RECORDS_PER_FILE, file_format=_FILE_FORMAT
  )


def _to_example(recording: Recording) -> dict[str, Any]:
  return {
    'audio': recording.audio,
    'sample_rate': recording.sample_rate,
    'key': recording.key,
    'txt': recording.txt,
    'extra': json.dumps(dict(recording.extra), ensure_ascii=False),
  }


def _index_name(split: str) -> str:
  return f'index-{split}.jsonl'


def _index_line(recording: Recording) -> str:
  fields = {
    'key': recording.key,
    'txt': recording.txt,
    'duration': recording.duration,
    'extra': dict(recording.extra),
  }
  return json.dumps(fields, ensure_ascii=False) + '\n'


def is_dataset(path: str | os.PathLike[str]) -> bool:
  """Says whether a folder is a data set that `write` has finished."""
  folder = pathlib.Path(path)
  # Under its final name a folder is complete; this looks for the right kind.
  return (folder / _INFO_FILE).is_file() and any(folder.glob(_index_name('*')))


def splits(path: str | os.PathLike[str]) -> list[str]:
  """Returns the names of a data set's splits, in the order of writing.

  Args:
    path: its folder.

  Raises:
    DatasetError: if the folder is not a data set.
  """
  folder = _require_dataset(path)
  info = json.loads((folder / _INFO_FILE).read_text(encoding='utf-8'))
  return [split['name'] for split in info['splits']]


def _require_dataset(path: str | os.PathLike[str]) -> pathlib.Path:
  folder = pathlib.Path(path)
  if not is_dataset(folder):
    raise DatasetError(
      f'{folder}: not a prepared data set; write one with '
      'python -m experiments.prepare_corpus'
    )
  return folder


def _require_split(path: str | os.PathLike[str], split: str) -> pathlib.Path:
  folder = _require_dataset(path)
  known = splits(folder)
  if split not in known:
    raise DatasetError(
      f'{folder}: no split {split!r}; there is {", ".join(known)}'
    )
  return folder


def read_index(
  path: str | os.PathLike[str], split: str
) -> list[manifest.Utterance]:
  """Lists the utterances of a split without opening their audio.

  Args:
    path: the data set's folder.
    split: one of its splits.

  Returns:
    Utterance i of the list is recording i of `read`; `wav` is empty, the
    duration known.

  Raises:
    DatasetError: if there is no such data set or split.
  """
  folder = _require_split(path, split)
  utterances = []
  with open(folder / _index_name(split), encoding='utf-8') as lines:
    for line in lines:
      fields = json.loads(line)
      extra = {**fields['extra'], 'duration': fields['duration']}
      utterances.append(
        manifest.Utterance(fields['key'], '', fields['txt'], extra)
      )
  return utterances


def read(path: str | os.PathLike[str], split: str) -> 'Recordings':
  """Opens a split for reading in any order.

  Args:
    path: the data set's folder.
    split: one of its splits.

  Returns:
    Its recordings; audio is read when one is asked for.

  Raises:
    DatasetError: if there is no such data set or split.
  """
  folder = _require_split(path, split)
  info = json.loads((folder / _INFO_FILE).read_text(encoding='utf-8'))
  lengths = {
    s['name']: sum(map(int, s['shardLengths'])) for s in info['splits']
  }
  return Recordings(folder, split, lengths[split])


class Recordings:
  """The recordings of a split, by number; may be sent to another process."""

  def __init__(self, folder: pathlib.Path, split: str, num_recordings: int):
    """Remembers where the recordings are; see `read`."""
    self._folder = folder
    self._split = split
    self._length = num_recordings
    self._source: Any = None

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Recording:
    """Reads one recording; IndexError if there is none of that number."""
    if not 0 <= index < self._length:
      raise IndexError(f'{index} is not in [0, {self._length})')
    if self._source is None:
      self._source = self._open()
    fields = self._source[index]
    return Recording(
      fields['key'].decode(),
      fields['txt'].decode(),
      fields['audio'],
      int(fields['sample_rate']),
      json.loads(fields['extra'].decode()),
    )

  def _open(self) -> Any:
    import tensorflow_datasets as tfds  # takes half a second

    builder = tfds.builder_from_directory(os.fspath(self._folder))
    return builder.as_data_source(self._split)

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, '_source': None}  # open files do not travel
