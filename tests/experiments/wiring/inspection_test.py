"""What inspect_data counts and draws."""

import dataclasses
import json

import pytest

from data_pipelines import plan
from data_pipelines import synthetic
from experiments.reporting import features as features_plot
from experiments.wiring import inspection
from u2moe_jax import config as config_lib


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tones')
  manifest = synthetic.write_corpus(folder, num_utterances=20, seed=4)
  data = config_lib.DataConfig(
    train=str(manifest),
    features=config_lib.FeatureConfig(num_mel_bins=20),
    batch_frames=400,
    num_buckets=2,
    plan_epochs=1,
  )
  return inspection.open_data(config_lib.Config(data=data))


def test_counts_are_those_of_the_plan(found):
  usage = inspection.count(found, epochs=3)
  assert [one.bucket for one in usage] == found.batches.buckets
  assert sum(one.utterances for one in usage) == 3 * 20
  planned = [b for n in range(3) for b in found.batches.epoch(n)]
  assert sum(one.batches for one in usage) == len(planned)
  assert sum(one.rows for one in usage) == sum(
    b.bucket.batch_size for b in planned
  )
  assert sum(one.tokens for one in usage) == 3 * sum(
    item.num_tokens for item in found.corpus.items
  )


def test_shares_by_hand():
  bucket = plan.Bucket(max_frames=100, max_tokens=10, batch_size=4)
  other = plan.Bucket(max_frames=200, max_tokens=20, batch_size=2)
  usage = [
    inspection.Usage(
      bucket, batches=2, rows=8, utterances=6, frames=540, tokens=30
    ),
    inspection.Usage(
      other, batches=1, rows=2, utterances=2, frames=300, tokens=40
    ),
  ]
  first, second, everything = inspection.table(usage)
  assert first['padded frames %'] == 10.0  # 60 of 600
  assert first['empty rows %'] == 25.0
  assert second['padded frames %'] == 25.0
  assert second['padded tokens %'] == 0.0
  assert everything['padded frames %'] == 16.0  # 160 of 1000
  assert everything['padded tokens %'] == 30.0  # 30 of 100
  assert everything['empty rows %'] == 20.0
  lines = inspection.format_table([first, second, everything]).splitlines()
  assert len(lines) == 4
  assert len({len(line) for line in lines}) == 1
  assert json.dumps([first, everything])


def test_shapes_that_nobody_uses_have_no_shares():
  usage = inspection.Usage(plan.Bucket(100, 10, 4))
  line, _ = inspection.table([usage])
  assert line['padded frames %'] == line['empty rows %'] == 0.0


def test_the_summary_tells_what_is_left_out(found):
  assert '20 utterances' in inspection.summary(found)
  assert 'left out' not in inspection.summary(found)
  data = dataclasses.replace(found.config.data, max_tokens=6)
  some = inspection.open_data(dataclasses.replace(found.config, data=data))
  assert 'left out: ' in inspection.summary(some)
  assert 'too_many_tokens' in inspection.summary(some)


def test_no_data_is_refused():
  with pytest.raises(config_lib.ConfigError, match=r'data\.train is empty'):
    inspection.open_data(config_lib.Config())


def test_examples_go_from_short_to_long(found):
  examples = inspection.examples(found, 3)
  lengths = [len(example.samples) for example in examples]
  assert len(lengths) == 3
  assert lengths == sorted(lengths)
  for example in examples:
    assert ''.join(example.tokens).replace('▁', ' ') == example.text
    changed = len(example.frames) / example.speed
    assert len(example.augmented) == pytest.approx(changed, abs=4)


def test_an_example_is_drawn(found):
  (example,) = inspection.examples(found, 1)
  picture = features_plot.plot(example, found.config.data)
  assert picture.startswith(b'\x89PNG')
  silent = dataclasses.replace(example, frames=example.frames * 0.0)
  assert features_plot.plot(silent, found.config.data) != picture
