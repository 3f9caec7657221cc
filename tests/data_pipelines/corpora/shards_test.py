"""WeNet shards: random access, an index that is kept, broken archives."""

import io
import json
import pathlib
import tarfile

import numpy as np
import pytest

from data_pipelines import manifest
from data_pipelines import sources
from data_pipelines import synthetic
from u2moe_jax.frontend import audio


def _pack(path, members):
  """Writes a tar file of (name, bytes) pairs."""
  with tarfile.open(path, 'w') as archive:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))


def _members(utterances):
  for item in utterances:
    yield f'{item.key}.wav', pathlib.Path(item.wav).read_bytes()
    yield f'{item.key}.txt', item.txt.encode()


@pytest.fixture
def tones(tmp_path):
  path = synthetic.write_corpus(tmp_path / 'wav', num_utterances=5, seed=1)
  return manifest.read(path)


@pytest.fixture
def shards(tones, tmp_path):
  """A list of two tar files, one of them named relative to it."""
  _pack(tmp_path / 'a.tar', _members(tones[:3]))
  _pack(tmp_path / 'b.tar', _members(tones[3:]))
  path = tmp_path / 'shards.list'
  path.write_text(f'{tmp_path}/a.tar\nb.tar\n')
  return path


def _reasons(source):
  return {
    u.key: u.problem.reason for u in source.utterances if u.problem is not None
  }


def test_they_are_their_manifest_in_any_order(shards, tones):
  source = sources.open_source(f'shards:{shards}')
  assert [u.key for u in source.utterances] == [u.key for u in tones]
  for index in (4, 0, 3, 1, 2):
    a, b = source.utterances[index], tones[index]
    assert (a.txt, a.duration) == (b.txt, b.duration)
    np.testing.assert_array_equal(source.load(index), audio.load_audio(b.wav))


def test_a_manifest_of_them_reads_the_same_bytes(shards, tones, tmp_path):
  source = sources.open_source(f'shards:{shards}')
  manifest.write(tmp_path / 'm.jsonl', source.utterances)
  again = sources.open_source(str(tmp_path / 'm.jsonl'))
  np.testing.assert_array_equal(again.load(4), source.load(4))


def test_the_index_is_kept_and_noticed_when_old(shards, tones, monkeypatch):
  first = sources.open_source(f'shards:{shards}')
  scanned = []
  real = tarfile.open

  def count(name, *arguments):
    if arguments == ('r:',):
      scanned.append(pathlib.Path(name).name)
    return real(name, *arguments)

  monkeypatch.setattr(tarfile, 'open', count)
  again = sources.open_source(f'shards:{shards}')
  assert not scanned
  assert list(again.utterances) == list(first.utterances)
  other = manifest.Utterance('new', tones[0].wav, 'NEW')
  _pack(shards.parent / 'b.tar', _members([other]))
  changed = sources.open_source(f'shards:{shards}')
  assert scanned == ['b.tar']
  assert [u.key for u in changed.utterances][3:] == ['new']
  index = pathlib.Path(f'{shards}.index')
  index.write_text('{"version": 99}\n')
  assert len(sources.open_source(f'shards:{shards}')) == 4
  assert json.loads(index.read_text().splitlines()[0]) == {'version': 1}


def test_one_tar_file_needs_no_list(shards, tones):
  source = sources.open_source(f'shards:{shards.parent}/a.tar')
  assert [u.key for u in source.utterances] == [u.key for u in tones[:3]]


def test_bad_members_are_named(tones, tmp_path, monkeypatch):
  def refuse(_):
    raise EOFError  # as the decoders behind librosa do, but at once

  monkeypatch.setattr(audio, '_decode_with_librosa', refuse)
  wav = pathlib.Path(tones[0].wav).read_bytes()
  _pack(
    tmp_path / 'x.tar',
    [
      ('latin.wav', wav),
      ('latin.txt', 'Grüße'.encode('latin-1')),
      ('mute.txt', b'A'),
      ('silent.wav', wav),
      ('blank.wav', wav),
      ('blank.txt', b' \n'),
      ('hollow.wav', b''),
      ('hollow.txt', b'A'),
      ('cut.wav', wav[: len(wav) // 2]),
      ('cut.txt', b'A'),
      ('noise.wav', b'no sound at all'),
      ('noise.txt', b'A'),
      ('good.wav', wav),
      ('good.txt', b'A'),
      ('readme.md', b'hello'),
    ],
  )
  source = sources.open_source(f'shards:{tmp_path}/x.tar')
  assert _reasons(source) == {
    'latin': 'bad_encoding',
    'mute': 'no_audio',
    'silent': 'no_text',
    'blank': 'no_text',
  }
  index_of = {u.key: i for i, u in enumerate(source.utterances)}
  for key, reason in (
    ('hollow', 'empty'),
    ('cut', 'truncated'),
    ('noise', 'unreadable'),
  ):
    with pytest.raises(audio.AudioError) as caught:
      source.load(index_of[key])
    assert caught.value.reason == reason
  assert len(source.load(index_of['good']))


@pytest.mark.parametrize('damage', ['cut', 'overwritten', 'no end'])
def test_a_broken_tar_is_named_and_the_rest_used(damage, shards, tones):
  tar = shards.parent / 'a.tar'
  data = tar.read_bytes()
  with tarfile.open(tar) as archive:
    third = archive.getmembers()[4].offset
  if damage == 'cut':
    data = data[: third + 600]
  elif damage == 'overwritten':
    data = data[:third] + b'x' * 512 + data[third + 512 :]
  else:
    data = data[:third]
  tar.write_bytes(data)
  source = sources.open_source(f'shards:{shards}')
  assert _reasons(source)[str(tar)] == 'broken_tar'
  usable = [u.key for u in source.utterances if u.problem is None]
  assert usable == [u.key for u in (*tones[:2], *tones[3:])]


def test_a_missing_tar_is_named(shards):
  (shards.parent / 'b.tar').unlink()
  source = sources.open_source(f'shards:{shards}')
  assert _reasons(source) == {f'{shards.parent}/b.tar': 'missing'}


def test_keys_must_be_unique(shards, tones):
  _pack(shards.parent / 'b.tar', _members(tones[2:]))
  with pytest.raises(sources.SourceError, match=f'{tones[2].key}.*also in'):
    sources.open_source(f'shards:{shards}')
  source = sources.open_source(f'shards:{shards}', tolerant=True)
  assert len(source) == 6
  assert _reasons(source) == {tones[2].key: 'duplicate_key'}


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'{"key": "a"}\n', 'this is a manifest'),
    (b'\xff\xfe\n', 'neither a tar file nor a UTF-8 list'),
    (b'\n', 'no utterance'),
  ],
)
def test_other_files_are_refused(content, message, tmp_path):
  (tmp_path / 'x.list').write_bytes(content)
  with pytest.raises(sources.SourceError, match=message):
    sources.open_source(f'shards:{tmp_path}/x.list')
  with pytest.raises(sources.SourceError, match='no such list'):
    sources.open_source(f'shards:{tmp_path}/none.list')


def test_compressed_archives_have_no_random_access(tones, tmp_path):
  with tarfile.open(tmp_path / 'a.tar.gz', 'w:gz') as archive:
    archive.add(tones[0].wav, 'a.wav')
  (tmp_path / 'x.list').write_text('a.tar.gz\n')
  source = sources.open_source(f'shards:{tmp_path}/x.list')
  (utterance,) = source.utterances
  assert utterance.problem is not None
  assert utterance.problem.reason == 'broken_tar'
  assert 'unpack it' in utterance.problem.detail
