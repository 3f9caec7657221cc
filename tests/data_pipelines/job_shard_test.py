"""Shares of a job."""

import pytest

from data_pipelines import job_shard


def test_i_of_n():
  shard = job_shard.parse('2/3')
  assert shard == job_shard.Shard(2, 3)
  assert (str(shard), shard.stem) == ('2/3', '2-of-3')
  assert job_shard.parse(None) == job_shard.Shard(0, 1)


@pytest.mark.parametrize('text', ['2/2', '-1/2', '1', 'a/b', '0/0', '1/2/3'])
def test_what_is_no_share_is_refused(text):
  with pytest.raises(job_shard.ShardError, match=f'--shard={text}'):
    job_shard.parse(text)


@pytest.mark.parametrize(('index', 'count'), [(2, 2), (-1, 2)])
def test_shares_are_counted_from_zero(index, count):
  with pytest.raises(job_shard.ShardError, match='counts from 0 to 1'):
    job_shard.Shard(index, count)
