"""Bad data: everything usable is trained on, everything else is named."""

import json

import jax
import numpy as np
import pytest
import soundfile

from data_pipelines import pipeline
from data_pipelines import synthetic
from experiments.configs import tiny
from experiments.wiring import training
from u2moe_jax import config as config_lib
from u2moe_jax.training import skips

_RATE = 16000
_NUM_GOOD = 800
_NUM_OF_EACH = 20  # in ten ways


def _sound(seconds):
  rng = np.random.default_rng(0)
  samples = synthetic.utterance('ABC', rng=rng)
  return np.resize(samples, int(seconds * _RATE))


def _write_sounds(folder):
  """One file for each way of being bad, and a good one."""
  soundfile.write(folder / 'good.wav', _sound(0.6), _RATE)
  soundfile.write(folder / 'short.wav', _sound(0.02), _RATE)
  soundfile.write(folder / 'long.wav', _sound(4.0), _RATE)
  (folder / 'empty.wav').write_bytes(b'')
  (folder / 'noise.wav').write_bytes(bytes(range(256)) * 40)
  whole = (folder / 'good.wav').read_bytes()
  (folder / 'cut.wav').write_bytes(whole[: len(whole) // 2])
  broken = _sound(0.6)
  broken[100] = np.nan
  soundfile.write(folder / 'nan.wav', broken, _RATE, 'FLOAT')
  soundfile.write(folder / 'loud.wav', 30000 * _sound(0.6), _RATE, 'FLOAT')


# Reason: fields of the manifest line. Some are seen before training, those
# with a duration only when their sound is loaded.
_WAYS = {
  'missing': {'wav': 'nowhere.wav'},
  'empty': {'wav': 'empty.wav'},
  'unreadable': {'wav': 'noise.wav', 'duration': 0.6},
  'truncated': {'wav': 'cut.wav', 'duration': 0.6},
  'not_finite': {'wav': 'nan.wav', 'duration': 0.6},
  'not_scaled': {'wav': 'loud.wav', 'duration': 0.6},
  'bad_segment': {'wav': 'good.wav', 'start': 0.5, 'end': 0.2},
  'too_short': {'wav': 'short.wav'},
  'too_long': {'wav': 'long.wav'},
  'labels_do_not_fit': {'wav': 'good.wav', 'txt': 'AB' * 40},
}


@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
  """1,000 utterances, 200 of them bad in ten ways, well mixed."""
  folder = tmp_path_factory.mktemp('bad')
  _write_sounds(folder)
  records = [
    {'key': f'good-{i}', 'wav': 'good.wav', 'txt': 'ABC', 'duration': 0.6}
    for i in range(_NUM_GOOD)
  ]
  records += [
    {'key': f'{reason}-{i}', 'txt': 'ABC', **fields}
    for reason, fields in _WAYS.items()
    for i in range(_NUM_OF_EACH)
  ]
  order = np.random.default_rng(0).permutation(len(records))
  file = folder / 'manifest.jsonl'
  file.write_text('\n'.join(json.dumps(records[i]) for i in order))
  return file


def _config(manifest, **changes):
  config = config_lib.from_dict(config_lib.Config, tiny.get_config().to_dict())
  keys = {
    'data.train': str(manifest),
    'data.max_seconds': 3.0,
    'data.max_batch_size': 100,
    'data.batch_frames': 20000,
    'data.augment.speeds': (1.0,),
    'data.plan_epochs': 1,
    'mesh.data': 1,
    'model.encoder.num_blocks': 1,
    'model.encoder.moe.num_experts': 0,
    'model.decoder.num_reverse_blocks': 0,
    'model.decoder.num_blocks': 0,
    # An epoch: what is bad can be seen only by loading it.
    'train.num_steps': 9,
    'train.log_every': 9,
    'train.save_every': 9,
  }
  for path, value in (keys | changes).items():
    config = config_lib.replace(config, path, value)
  return config


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  devices = jax.devices
  monkeypatch.setattr(jax, 'devices', lambda *args: devices(*args)[:1])


def _lines(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def test_exactly_the_bad_ones_are_named(manifest, tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(
    'absl.logging.warning', lambda text, *parts: warnings.append(text % parts)
  )
  assert training.train(_config(manifest), tmp_path) is True
  lines = _lines(tmp_path / 'skipped.jsonl')
  assert len(lines) == 200
  found = {line['key']: line['reason'] for line in lines}
  assert found == {
    f'{reason}-{i}': reason for reason in _WAYS for i in range(_NUM_OF_EACH)
  }
  (last,) = (
    line
    for line in _lines(tmp_path / 'metrics.jsonl')
    if line['kind'] == 'train' and line['step'] == 9
  )
  assert last['skipped_utterances'] == 200
  assert np.isfinite(last['loss'])
  assert last['skipped_updates'] == 0
  assert any('120 utterances left out' in text for text in warnings)


def test_a_dev_set_that_cannot_be_read_is_refused(manifest, tmp_path):
  unreadable = manifest.parent / 'dev.jsonl'
  lines = manifest.read_text().splitlines()
  unreadable.write_text('\n'.join(x for x in lines if '"truncated-' in x))
  config = _config(manifest, **{'data.dev': str(unreadable)})
  with pytest.raises(pipeline.NoDataError, match='dev.jsonl can be read'):
    training.train(config, tmp_path)
  found = _lines(tmp_path / 'skipped.jsonl')
  assert sum(line['split'] == 'dev' for line in found) == _NUM_OF_EACH


@pytest.mark.parametrize(
  ('strict', 'share', 'words'),
  [
    (True, 0.5, ['120 of 1000', '20 bad_segment', '--strict']),
    (False, 0.05, ['120 of 1000', '20 bad_segment', 'max_skipped=0.05']),
  ],
)
def test_it_ends_before_training_if_asked(
  manifest, tmp_path, strict, share, words
):
  config = _config(manifest, **{'data.max_skipped': share})
  with pytest.raises(skips.BadDataError) as error:
    training.train(config, tmp_path, strict=strict)
  for word in words:
    assert word in str(error.value)
  assert len(_lines(tmp_path / 'skipped.jsonl')) == 120
  assert not (tmp_path / 'config.json').exists()
