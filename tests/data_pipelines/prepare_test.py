"""Preparing a corpus: complete, once, and nothing half done."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from data_pipelines import assembly
from data_pipelines import job_shard
from data_pipelines import manifest
from data_pipelines import pieces
from data_pipelines import prepare
from data_pipelines import sources
from data_pipelines import synthetic
from data_pipelines import tfds_dataset
from data_pipelines.corpora import espeak
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import cmvn
from u2moe_jax.frontend import fbank
from u2moe_jax.text import tokenizer

_SIZES = {'num_train': 4, 'num_dev': 1, 'num_test': 1, 'num_workers': 0}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  return synthetic.write_corpus(folder, num_utterances=3, seed=1)


def _prepare(out, path, dev=None, **options):
  specs = {'train': str(path)} | ({'dev': str(dev)} if dev else {})
  return prepare.prepare(out, specs, **options)


def test_builtin_corpus_is_what_the_engine_speaks(tmp_path):
  out = tmp_path / 'out'
  prepare.prepare_builtin(out, seed=3, **_SIZES)
  built = list(espeak.build(seed=3, **_SIZES))
  assert tfds_dataset.splits(out) == ['train', 'dev', 'test']
  for split in ('train', 'dev', 'test'):
    expected = [r for s, r in built if s == split]
    for a, b in zip(tfds_dataset.read(out, split), expected, strict=True):
      assert (a.key, a.txt, a.extra) == (b.key, b.txt, b.extra)
      np.testing.assert_array_equal(a.audio, b.audio)
  assert not (out / prepare.SKIPPED_FILE).read_text()


def _statistics(recordings) -> cmvn.CmvnStats:
  features = config_lib.FeatureConfig()
  stats = cmvn.empty(features.num_mel_bins)
  for recording in recordings:
    samples = (recording.audio / 32768).astype(np.float32)
    stats = cmvn.accumulate(stats, fbank.fbank(samples, features))
  return stats


def test_statistics_and_characters_are_those_of_train(corpus, tmp_path):
  dev = synthetic.write_corpus(tmp_path / 'dev', num_utterances=1, seed=2)
  txt = manifest.read(dev)[0]
  manifest.write(dev, [manifest.Utterance('d', txt.wav, 'XYZ')])
  _prepare(tmp_path / 'out', corpus, dev=dev)
  read = {s: tfds_dataset.read(tmp_path / 'out', s) for s in ('train', 'dev')}
  saved = cmvn.load(tmp_path / 'out' / prepare.CMVN_FILE)
  train = _statistics(read['train'])
  np.testing.assert_allclose(saved.mean, train.mean)
  np.testing.assert_allclose(saved.istd, train.istd)
  both = cmvn.merge(train, _statistics(read['dev']))
  assert not np.allclose(saved.mean, both.mean)
  table = tokenizer.load(tmp_path / 'out' / prepare.TOKENS_FOLDER)
  for recording in read['train']:
    assert table.decode(table.encode(recording.txt)) == recording.txt
  assert table.unknown_characters('XYZ') == ['X', 'Y', 'Z']


def test_16_bit_files_are_packed_as_they_are(corpus, tmp_path):
  _prepare(tmp_path / 'out', corpus)
  recordings = tfds_dataset.read(tmp_path / 'out', 'train')
  for item, recording in zip(manifest.read(corpus), recordings, strict=True):
    with open(item.wav, 'rb') as file:
      assert file.read()[44:] == recording.audio.tobytes()


def test_to_int16_rounds_and_clips():
  samples = np.array([-1.5, -1.0, -0.5 / 32768, 0.6 / 32768, 1.0], np.float32)
  assert prepare.to_int16(samples).tolist() == [-32768, -32768, 0, 1, 32767]


def test_a_second_run_does_nothing(corpus, tmp_path, capsys):
  out = tmp_path / 'out'
  _prepare(out, corpus)
  before = {p: p.stat().st_mtime_ns for p in out.rglob('*')}
  capsys.readouterr()
  _prepare(out, corpus)
  assert 'already prepared, nothing to do' in capsys.readouterr().out
  assert {p: p.stat().st_mtime_ns for p in out.rglob('*')} == before
  _prepare(out, corpus, force=True)
  assert {p: p.stat().st_mtime_ns for p in out.rglob('*')} != before


def test_another_corpus_in_the_folder_is_not_overwritten(corpus, tmp_path):
  out = tmp_path / 'out'
  _prepare(out, corpus)
  other = synthetic.write_corpus(tmp_path / 'b', num_utterances=1, seed=9)
  with pytest.raises(prepare.PrepareError, match='--force'):
    _prepare(out, other)
  assert len(tfds_dataset.read(out, 'train')) == 3
  _prepare(out, other, force=True)
  assert len(tfds_dataset.read(out, 'train')) == 1


@pytest.mark.parametrize('force', [False, True])
def test_a_folder_of_something_else_is_never_touched(corpus, force, tmp_path):
  (tmp_path / 'thesis.txt').write_text('years of work')
  with pytest.raises(prepare.PrepareError, match='holds something else'):
    _prepare(tmp_path, corpus, force=force)
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']


def test_unusable_audio_is_left_out_and_listed(corpus, tmp_path, capsys):
  good = manifest.read(corpus)[0]
  bad = manifest.Utterance('bad', '/none/bad.wav', 'A')
  manifest.write(tmp_path / 'm.jsonl', [bad, good])
  _prepare(tmp_path / 'out', tmp_path / 'm.jsonl')
  recordings = tfds_dataset.read(tmp_path / 'out', 'train')
  assert [r.key for r in recordings] == [good.key]
  (line,) = (tmp_path / 'out/skipped.jsonl').read_text().splitlines()
  skipped = json.loads(line)
  assert (skipped['key'], skipped['reason']) == ('bad', 'missing')
  printed = capsys.readouterr()
  assert 'left out bad' in printed.err
  assert 'left out 1 utterances' in printed.out


def test_nothing_usable_leaves_nothing(tmp_path):
  bad = manifest.Utterance('bad', '/none/bad.wav', 'A')
  manifest.write(tmp_path / 'm.jsonl', [bad])
  with pytest.raises(prepare.PrepareError, match='no utterance to write'):
    _prepare(tmp_path / 'out', tmp_path / 'm.jsonl')
  assert [p.name for p in tmp_path.iterdir()] == ['m.jsonl']


def test_train_without_audio_is_refused(corpus, tmp_path):
  bad = manifest.Utterance('bad', '/none/bad.wav', 'A')
  manifest.write(tmp_path / 'm.jsonl', [bad])
  with pytest.raises(prepare.PrepareError, match='CMVN statistics'):
    _prepare(tmp_path / 'out', tmp_path / 'm.jsonl', dev=corpus)
  assert not (tmp_path / 'out').exists()


def test_sizes_must_be_positive(tmp_path):
  with pytest.raises(prepare.PrepareError, match='num_dev is 0'):
    prepare.prepare_builtin(tmp_path / 'out', num_dev=0)


@pytest.fixture
def many(tmp_path, monkeypatch):
  """A manifest of ten utterances that fill five pieces."""
  monkeypatch.setattr(prepare, '_LEAST_PER_FILE', 2)
  monkeypatch.setattr(prepare, '_FILES_OF_SMALL', 5)
  return synthetic.write_corpus(tmp_path / 'wav', num_utterances=10, seed=4)


def _files(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def test_pieces_keep_the_order_of_the_source(many, tmp_path):
  assert _prepare(tmp_path / 'out', many)
  names = [path.name for path in (tmp_path / 'out').glob('speech-train*')]
  assert len(names) == 5
  source = sources.open_source(f'{tmp_path}/out')
  expected = sources.open_source(str(many))
  assert [u.key for u in source.utterances] == [
    u.key for u in expected.utterances
  ]
  for index in range(10):
    np.testing.assert_array_equal(source.load(index), expected.load(index))


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
def test_jobs_in_any_order_make_the_same_data_set(many, order, tmp_path):
  _prepare(tmp_path / 'whole', many)
  out = tmp_path / 'out'
  for index in order[:-1]:
    assert not _prepare(out, many, shard=job_shard.Shard(index, 3))
    assert not out.exists()
    with pytest.raises(tfds_dataset.DatasetError, match='not complete yet'):
      sources.open_source(f'prepared:{out}')
  assert _prepare(out, many, shard=job_shard.Shard(order[-1], 3))
  assert _files(out) == _files(tmp_path / 'whole')
  assert not tfds_dataset.staging_folder(out).exists()
  assert _prepare(out, many, shard=job_shard.Shard(0, 3))  # nothing to do


def test_a_job_can_be_done_again_as_other_shares(many, tmp_path):
  out = tmp_path / 'out'
  _prepare(out, many, shard=job_shard.Shard(0, 2))
  _prepare(out, many, shard=job_shard.Shard(0, 2))
  assert _prepare(out, many)
  _prepare(tmp_path / 'whole', many)
  assert _files(out) == _files(tmp_path / 'whole')


def _stop_after(monkeypatch, count, error=KeyboardInterrupt):
  """Lets loading fail after so many utterances."""
  real, calls = sources.FileSource.load, []

  def load(self, index):
    calls.append(self.utterances[index].key)
    if len(calls) > count:
      raise error
    return real(self, index)

  monkeypatch.setattr(sources.FileSource, 'load', load)
  return calls


def test_an_interrupted_run_continues(many, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  with monkeypatch.context() as patch:
    _stop_after(patch, 5)  # in the middle of the third piece
    with pytest.raises(KeyboardInterrupt):
      _prepare(out, many)
  staging = tfds_dataset.staging_folder(out)
  assert not out.exists()
  assert not list(staging.rglob('*.partial'))
  receipts = sorted(p.name for p in (staging / 'pieces').glob('*.json'))
  assert receipts == ['train-00000.json', 'train-00001.json']
  with monkeypatch.context() as patch:
    calls = _stop_after(patch, 100)
    assert _prepare(out, many)
  assert calls == [f'tones-4-000{index}' for index in range(4, 10)]
  _prepare(tmp_path / 'whole', many)
  assert _files(out) == _files(tmp_path / 'whole')


def test_a_full_disk_leaves_what_can_be_continued(many, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  with monkeypatch.context() as patch:
    _stop_after(patch, 3, OSError('no space left on device'))
    with pytest.raises(OSError, match='no space'):
      _prepare(out, many)
  assert not out.exists()
  assert _prepare(out, many)


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'no receipt', 'index'])
def test_what_a_killed_run_left_is_verified(many, damage, tmp_path):
  """A process that is killed leaves files of any kind under its own names."""
  out = tmp_path / 'out'
  _prepare(out, many, shard=job_shard.Shard(0, 2))  # pieces 0, 2 and 4
  staging = tfds_dataset.staging_folder(out)
  (staging / 'train-00001.host-7.partial').write_bytes(b'half a piece')
  file = staging / 'speech-train.array_record-00002'
  data = file.read_bytes()
  if damage == 'cut':
    file.write_bytes(data[:-1])
  elif damage == 'flipped':
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  elif damage == 'no receipt':
    (staging / 'pieces/train-00002.json').unlink()
  else:
    (staging / 'pieces/train-00002.jsonl').write_text('{}\n')
  assert _prepare(out, many)
  _prepare(tmp_path / 'whole', many)
  assert _files(out) == _files(tmp_path / 'whole')


def test_merge_needs_all_pieces_and_no_source(many, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  with pytest.raises(prepare.PrepareError, match='nothing to merge'):
    prepare.merge(out)
  _prepare(out, many, shard=job_shard.Shard(0, 2))
  with pytest.raises(prepare.PrepareError, match='2 of 5 pieces are missing'):
    prepare.merge(out)
  with monkeypatch.context() as patch:
    # As if both jobs had looked before either had finished.
    patch.setattr(assembly, 'missing', lambda *_: [None])
    assert not _prepare(out, many, shard=job_shard.Shard(1, 2))
  shutil.rmtree(many.parent)
  prepare.merge(out)
  assert len(tfds_dataset.read(out, 'train')) == 10
  prepare.merge(out)  # nothing to do


def test_two_jobs_may_put_it_together_at_once(many, tmp_path, monkeypatch):
  """The second one finds, in the middle of it, that the folder is gone."""
  out = tmp_path / 'out'
  _prepare(out, many, shard=job_shard.Shard(0, 2))
  real = assembly._write_statistics

  def slow(own, receipts):
    monkeypatch.setattr(assembly, '_write_statistics', real)
    prepare.merge(out)
    return real(own, receipts)

  monkeypatch.setattr(assembly, '_write_statistics', slow)
  assert _prepare(out, many, shard=job_shard.Shard(1, 2))
  monkeypatch.undo()
  assert prepare.verify(out)
  assert not tfds_dataset.staging_folder(out).exists()
  known = set(_files(out)) - {prepare.assembly.CHECKSUMS_FILE}
  assert known == set(assembly._read_checksums(out))


def test_a_source_that_changed_is_not_continued(many, tmp_path):
  out = tmp_path / 'out'
  _prepare(out, many, shard=job_shard.Shard(0, 2))
  manifest.write(many, manifest.read(many)[:-1])
  with pytest.raises(prepare.PrepareError, match='source has changed'):
    _prepare(out, many)
  assert _prepare(out, many, force=True)
  assert len(tfds_dataset.read(out, 'train')) == 9
  with pytest.raises(prepare.PrepareError, match='throw away'):
    _prepare(out, many, shard=job_shard.Shard(0, 2), force=True)


def test_verify_names_what_is_damaged(corpus, tmp_path, capsys):
  out = tmp_path / 'out'
  _prepare(out, corpus)
  assert prepare.verify(out)
  cmvn_file, table = out / prepare.CMVN_FILE, out / 'tokens/units.txt'
  data = cmvn_file.read_bytes()
  cmvn_file.write_bytes(data.replace(b'1', b'2', 1))
  table.unlink()
  (out / prepare.SKIPPED_FILE).write_text('more')
  capsys.readouterr()
  assert not prepare.verify(out)
  printed = capsys.readouterr().out
  assert f'{cmvn_file}: is damaged' in printed
  assert f'{table}: is missing' in printed
  assert 'has 4 bytes, not 0' in printed
  assert len(printed.splitlines()) == 3
  with pytest.raises(assembly.AssemblyError, match='no checksums'):
    prepare.verify(tmp_path)


def test_the_summary_counts_by_reason(corpus, tmp_path, capsys):
  good = manifest.read(corpus)
  bad = [manifest.Utterance(f'b{i}', '/none.wav', 'A') for i in range(2)]
  long = manifest.Utterance('long', good[0].wav, 'A', {'duration': 99.0})
  manifest.write(tmp_path / 'm.jsonl', [*good, *bad, long])
  prepare.prepare(
    tmp_path / 'out',
    {'train': str(tmp_path / 'm.jsonl'), 'dev': str(corpus)},
    max_seconds=30.0,
    min_seconds=0.01,
  )
  summary = json.loads((tmp_path / 'out' / assembly.SUMMARY_FILE).read_text())
  train = summary['splits']['train']
  assert train['utterances'] == 3
  assert train['skipped'] == {'missing': 2, 'too_long': 1}
  seconds = sum(u.duration or 0 for u in good)
  assert train['hours'] == pytest.approx(seconds / 3600, abs=1e-4)
  assert '2 missing, 1 too_long' in capsys.readouterr().out


def test_other_rates_are_kept_or_made(corpus, tmp_path):
  _prepare(tmp_path / 'out', corpus, sample_rate=8000)
  recording = tfds_dataset.read(tmp_path / 'out', 'train')[0]
  assert recording.sample_rate == 8000
  known = manifest.read(corpus)[0].duration
  assert recording.duration == pytest.approx(known, abs=1e-3)
  # The statistics are those of the default features all the same.
  stats = cmvn.load(tmp_path / 'out' / prepare.CMVN_FILE)
  frames = sum(
    (len(r.audio) * 2 - 400) // 160 + 1
    for r in tfds_dataset.read(tmp_path / 'out', 'train')
  )
  assert stats.count == frames


def test_a_segment_is_packed_as_a_recording(corpus, tmp_path):
  item = manifest.read(corpus)[0]
  extra = {'start': 0.1, 'end': 0.3, 'speaker': 's'}
  part = manifest.Utterance('part', item.wav, 'A', extra)
  manifest.write(tmp_path / 'm.jsonl', [part])
  _prepare(tmp_path / 'out', tmp_path / 'm.jsonl')
  (recording,) = tfds_dataset.read(tmp_path / 'out', 'train')
  assert len(recording.audio) == 3200
  assert recording.extra == {'speaker': 's'}


def test_characters_that_train_lacks_are_told(corpus, tmp_path, capsys):
  item = manifest.read(corpus)[0]
  manifest.write(
    tmp_path / 'dev.jsonl', [manifest.Utterance('d', item.wav, 'AÜB')]
  )
  _prepare(tmp_path / 'out', corpus, dev=tmp_path / 'dev.jsonl')
  assert '(unknown_tokens): Ü' in capsys.readouterr().out


def test_processes_write_the_same(many, tmp_path):
  _prepare(tmp_path / 'one', many, num_workers=0)
  _prepare(tmp_path / 'two', many, num_workers=2)
  assert _files(tmp_path / 'one') == _files(tmp_path / 'two')


def test_a_receipt_is_of_one_plan(many, tmp_path):
  out = tmp_path / 'out'
  _prepare(out, many, shard=job_shard.Shard(0, 2))
  staging = tfds_dataset.staging_folder(out)
  plan = pieces.read_plan(staging)
  assert plan is not None
  piece = plan.pieces()[0]
  assert pieces.is_whole(staging, piece, plan.digest)
  assert not pieces.is_whole(staging, piece, 'another')
  with pytest.raises(pieces.PieceError, match='another data set'):
    pieces.read_receipt(staging, piece, 'another')
