"""Prepared data sets: round trip, random access, all or nothing."""

import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import tfds_dataset

_ROOT = pathlib.Path(__file__).parents[2]


def _recording(index: int, key: str = '') -> tfds_dataset.Recording:
  rng = np.random.default_rng(index)
  info = np.iinfo(np.int16)
  samples = rng.integers(
    info.min, info.max, 50 + index, np.int16, endpoint=True
  )
  extra = {'speaker': f's{index}', 'snr': None, 'text': 'Grüße\n'}
  return tfds_dataset.Recording(
    key or f'k{index}', f'TEXT {index} 你好', samples, 8000 + index, extra
  )


def _pairs(num_train: int = 5):
  yield from (('train', _recording(i)) for i in range(num_train))
  yield 'dev', _recording(77)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('data') / 'set'
  tfds_dataset.write(folder, _pairs())
  return folder


def _fields(recording: tfds_dataset.Recording) -> tuple:
  r = recording
  return r.key, r.txt, r.audio.tolist(), r.audio.dtype, r.sample_rate, r.extra


def test_what_is_written_is_read_in_any_order(folder):
  recordings = tfds_dataset.read(folder, 'train')
  assert len(recordings) == 5
  for index in (4, 0, 2, 2):
    assert _fields(recordings[index]) == _fields(_recording(index))
  assert _fields(tfds_dataset.read(folder, 'dev')[0]) == _fields(_recording(77))


def test_other_recordings_are_told_apart(folder):
  recordings = tfds_dataset.read(folder, 'train')
  assert _fields(recordings[1]) != _fields(_recording(2))


def test_order_holds_across_files(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds_dataset, '_RECORDS_PER_FILE', 3)
  tfds_dataset.write(tmp_path / 'set', _pairs(num_train=11))
  recordings = tfds_dataset.read(tmp_path / 'set', 'train')
  assert len(list((tmp_path / 'set').glob('speech-train*'))) == 4
  assert [r.key for r in recordings] == [f'k{i}' for i in range(11)]


def test_there_is_nothing_outside_the_range(folder):
  recordings = tfds_dataset.read(folder, 'train')
  for index in (-1, 5):
    with pytest.raises(IndexError):
      recordings[index]


def test_open_recordings_travel_to_another_process(folder):
  recordings = tfds_dataset.read(folder, 'train')
  first = _fields(recordings[3])
  assert _fields(pickle.loads(pickle.dumps(recordings))[3]) == first


def test_index_tells_all_but_the_audio(folder):
  utterances = tfds_dataset.read_index(folder, 'train')
  recordings = tfds_dataset.read(folder, 'train')
  for item, recording in zip(utterances, recordings, strict=True):
    extra = {**recording.extra, 'duration': recording.duration}
    assert (item.key, item.txt, item.extra) == (
      recording.key,
      recording.txt,
      extra,
    )
    assert item.duration == len(recording.audio) / recording.sample_rate


def test_splits_are_listed_and_others_named(folder):
  assert tfds_dataset.splits(folder) == ['train', 'dev']
  for read in (tfds_dataset.read, tfds_dataset.read_index):
    with pytest.raises(tfds_dataset.DatasetError, match="no split 'test'"):
      read(folder, 'test')


def test_other_folders_are_no_data_sets(folder, tmp_path):
  assert tfds_dataset.is_dataset(folder)
  assert not tfds_dataset.is_dataset(tmp_path)
  assert not tfds_dataset.is_dataset(tmp_path / 'none')
  with pytest.raises(tfds_dataset.DatasetError, match='prepare_corpus'):
    tfds_dataset.splits(tmp_path)


def _broken():
  yield from _pairs()
  raise KeyboardInterrupt


@pytest.mark.parametrize('there_before', [False, True])
def test_interrupted_write_changes_nothing(there_before, tmp_path):
  target = tmp_path / 'set'
  if there_before:
    tfds_dataset.write(target, _pairs(num_train=2))
  with pytest.raises(KeyboardInterrupt):
    tfds_dataset.write(target, _broken())
  assert list(tmp_path.iterdir()) == ([target] if there_before else [])
  if there_before:
    assert len(tfds_dataset.read(target, 'train')) == 2


def test_write_clears_away_what_a_killed_one_left(tmp_path):
  leftover = tmp_path / 'set.incomplete'
  leftover.mkdir()
  (leftover / 'index-old.jsonl').write_text('')
  tfds_dataset.write(tmp_path / 'set', _pairs())
  assert list(tmp_path.iterdir()) == [tmp_path / 'set']
  assert tfds_dataset.splits(tmp_path / 'set') == ['train', 'dev']
  assert not (tmp_path / 'set/index-old.jsonl').exists()


def test_finish_adds_files_before_the_folder_appears(tmp_path):
  target = tmp_path / 'set'

  def finish(folder: pathlib.Path) -> None:
    assert not target.exists()
    assert tfds_dataset.splits(folder) == ['train', 'dev']
    (folder / 'more.txt').write_text('more')

  tfds_dataset.write(target, _pairs(), finish=finish)
  assert (target / 'more.txt').read_text() == 'more'


def test_a_key_may_not_occur_twice_in_a_split(tmp_path):
  twice = [('train', _recording(1, 'a')), ('train', _recording(2, 'a'))]
  with pytest.raises(tfds_dataset.DatasetError, match="'a' occurs twice"):
    tfds_dataset.write(tmp_path / 'set', twice)
  apart = [('train', _recording(1, 'a')), ('dev', _recording(2, 'a'))]
  tfds_dataset.write(tmp_path / 'set', apart)


def test_an_empty_data_set_is_refused(tmp_path):
  with pytest.raises(tfds_dataset.DatasetError, match='no utterance'):
    tfds_dataset.write(tmp_path / 'set', [])
  assert not list(tmp_path.iterdir())


def test_nothing_is_written_elsewhere_and_tensorflow_stays_away(tmp_path):
  home = tmp_path / 'home'
  code = (
    'import sys; import numpy as np; from data_pipelines import tfds_dataset\n'
    "assert 'tensorflow_datasets' not in sys.modules\n"
    "r = tfds_dataset.Recording('a', 'A', np.ones(9, np.int16), 16000)\n"
    "tfds_dataset.write(sys.argv[1], [('train', r)])\n"
    "assert tfds_dataset.read(sys.argv[1], 'train')[0].audio.sum() == 9\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  keep = {k: v for k, v in os.environ.items() if not k.startswith('XDG_')}
  env = {**keep, 'HOME': str(home), 'PYTHONPATH': str(_ROOT)}
  command = [sys.executable, '-c', code, str(tmp_path / 'set')]
  subprocess.run(command, check=True, env=env, cwd=tmp_path)
  assert list(tmp_path.iterdir()) == [tmp_path / 'set']
