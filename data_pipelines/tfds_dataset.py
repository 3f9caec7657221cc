"""Prepared data sets: TFDS folders of ArrayRecord files, without TensorFlow.

A folder holds, for each split, int16 audio with its transcript, to be read in
any order, and `index-SPLIT.jsonl` with everything but the audio, so that
batches can be planned without opening it.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class FileSize:
  """What the metadata need to know of one file of recordings.

  Attributes:
    num_recordings: in the file; may be 0.
    num_bytes: of the recordings before compression.
  """

  num_recordings: int
  num_bytes: int


def file_name(split: str, number: int) -> str:
  """Name of a file of recordings; files of a split are numbered from 0."""
  return f'{_NAME}-{split}.{_FILE_FORMAT}-{number:05d}'


def index_name(split: str) -> str:
  """Name of the file with everything of a split but its audio."""
  return f'index-{split}.jsonl'


class RecordWriter:
  """Writes one file of recordings; complete only when it has been closed."""

  def __init__(self, path: str | os.PathLike[str]):
    """Opens a file; one that is there is written over."""
    from array_record.python import array_record_module

    # One record a group: recordings are read one by one, in any order.
    self._writer = array_record_module.ArrayRecordWriter(
      os.fspath(path), 'group_size:1'
    )
    self._features, self._serializer = _features()
    self._size = FileSize(0, 0)

  def add(self, recording: Recording) -> None:
    """Writes a recording behind the others."""
    example = self._features.encode_example(_to_example(recording))
    # Otherwise each process has its own order of the fields, and files would
    # differ though they hold the same.
    proto = self._serializer.get_tf_example(example)
    data = proto.SerializeToString(deterministic=True)
    self._writer.write(data)
    size = self._size
    self._size = FileSize(size.num_recordings + 1, size.num_bytes + len(data))

  def close(self) -> FileSize:
    """Ends the file; returns what is in it."""
    if self._writer.is_open():
      self._writer.close()
    return self._size


def write_metadata(
  folder: str | os.PathLike[str], files: Mapping[str, Sequence[FileSize]]
) -> None:
  """Writes the files that make a folder of recordings a TFDS data set.

  Args:
    folder: has the files named by `file_name`.
    files: of each split, in the order of their numbers.
  """
  import tensorflow_datasets as tfds  # takes half a second

  folder = os.fspath(folder)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=_NAME,
    version=tfds.core.Version(_VERSION),
    data_dir=folder,
    module_name=__name__,
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description='Utterances with transcripts.',
    features=_features()[0],
    # Record i of the data is line i of the index.
    disable_shuffling=True,
  )
  info.set_file_format(_FILE_FORMAT)
  template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}'
  infos = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=[size.num_recordings for size in sizes],
      num_bytes=sum(size.num_bytes for size in sizes),
      filename_template=tfds.core.ShardedFileTemplate(
        dataset_name=_NAME,
        data_dir=folder,
        split=split,
        filetype_suffix=_FILE_FORMAT,
        template=template,
      ),
    )
    for split, sizes in files.items()
  ]
  info.set_splits(tfds.core.splits.SplitDict(infos))
  info.write_to_directory(folder)


def write(
  folder: str | os.PathLike[str],
  recordings: Iterable[tuple[str, Recording]],
  *,
  finish: Callable[[pathlib.Path], None] | None = None,
) -> None:
  """Writes a data set; the folder appears when everything is in it.

  Until then the files are in `FOLDER.incomplete` beside it, which an error
  removes and the next `write` clears away. For corpora that take long, see
  `prepare.prepare`.

  Args:
    folder: where to; replaced if it is there.
    recordings: (split, recording) pairs; their order within a split is kept.
    finish: called last, with the folder where the files are then, to add
      files of its own.

  Raises:
    DatasetError: for a key that a split has twice, or no recording at all.
  """
  folder = pathlib.Path(os.path.abspath(folder))
  staging = staging_folder(folder)
  shutil.rmtree(staging, ignore_errors=True)
  staging.mkdir(parents=True)
  try:
    _write_records(staging, recordings)
    if finish is not None:
      finish(staging)
    replace_folder(staging, folder)
  finally:
    shutil.rmtree(staging, ignore_errors=True)


def staging_folder(folder: pathlib.Path) -> pathlib.Path:
  """Where a data set is while it is not complete."""
  return folder.with_name(f'{folder.name}.incomplete')


def replace_folder(source: pathlib.Path, target: pathlib.Path) -> None:
  """Gives a complete folder its name."""
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
  splits: dict[str, _SplitWriter] = {}
  with contextlib.ExitStack() as open_files:
    for split, recording in recordings:
      if split not in splits:
        splits[split] = _SplitWriter(folder, split)
        open_files.callback(splits[split].close)
      splits[split].add(recording)
  if not splits:
    raise DatasetError('there is no utterance to write')
  write_metadata(folder, {s: writer.sizes for s, writer in splits.items()})


class _SplitWriter:
  """Writes one split: files of so many recordings, and its index.

  Attributes:
    sizes: of the files that are complete.
  """

  def __init__(self, folder: pathlib.Path, split: str):
    self.sizes: list[FileSize] = []
    self._folder, self._split = folder, split
    self._index = (folder / index_name(split)).open('w', encoding='utf-8')
    self._keys: set[str] = set()
    self._writer: RecordWriter | None = None

  def add(self, recording: Recording) -> None:
    if recording.key in self._keys:
      raise DatasetError(
        f'the key {recording.key!r} occurs twice in the split '
        f'{self._split!r}; keys must be unique'
      )
    if len(self._keys) % _RECORDS_PER_FILE == 0:
      self._end_file()
      name = file_name(self._split, len(self.sizes))
      self._writer = RecordWriter(self._folder / name)
    self._keys.add(recording.key)
    assert self._writer is not None  # the first recording opens it
    self._writer.add(recording)
    self._index.write(index_line(recording))

  def _end_file(self) -> None:
    if self._writer is not None:
      self.sizes.append(self._writer.close())
      self._writer = None

  def close(self) -> None:
    self._end_file()
    self._index.close()


@functools.cache
def _features() -> tuple[Any, Any]:
  """The features of a record, and what turns them into bytes."""
  import tensorflow_datasets as tfds  # takes half a second

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
  serializer = tfds.core.example_serializer.ExampleSerializer(
    features.get_serialized_info()
  )
  return features, serializer


def _to_example(recording: Recording) -> dict[str, Any]:
  return {
    'audio': recording.audio,
    'sample_rate': recording.sample_rate,
    'key': recording.key,
    'txt': recording.txt,
    'extra': json.dumps(dict(recording.extra), ensure_ascii=False),
  }


def index_line(recording: Recording) -> str:
  """The line of a recording in the index of its split."""
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
  return (folder / _INFO_FILE).is_file() and any(folder.glob(index_name('*')))


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
    staging = staging_folder(pathlib.Path(os.path.abspath(folder)))
    if staging.is_dir():
      raise DatasetError(
        f'{folder}: not complete yet; run the same prepare_corpus again, or '
        f'those of its --shard that are missing ({staging} has what is there)'
      )
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


def read_index(path: str | os.PathLike[str], split: str) -> manifest.Table:
  """Lists the utterances of a split without opening their audio.

  Args:
    path: the data set's folder.
    split: one of its splits.

  Returns:
    Utterance i of the table is recording i of `read`; `wav` is empty, the
    duration known.

  Raises:
    DatasetError: if there is no such data set or split.
  """
  folder = _require_split(path, split)
  data = (folder / index_name(split)).read_bytes()
  # Found in the bytes, without an object for each line.
  ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord('\n'))
  starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
  rows = np.stack([starts, ends], axis=1)
  durations = [
    json.loads(data[first:last])['duration'] for first, last in rows.tolist()
  ]
  return manifest.Table(
    data, rows, _from_index_line, durations=np.array(durations, np.float64)
  )


def _from_index_line(line: str) -> manifest.Utterance:
  fields = json.loads(line)
  extra = {**fields['extra'], 'duration': fields['duration']}
  return manifest.Utterance(fields['key'], '', fields['txt'], extra)


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
    # Opened where it is read: an open file cannot be sent to another process.
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
