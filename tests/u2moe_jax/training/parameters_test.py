"""Groups of parameters: each name means what it says, in every model."""

import jax
import pytest

from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.training import parameters


@pytest.fixture(scope='module')
def moe():
  return directory.abstract_variables(tiny.model_config(tiny.moe()))['params']


def _chosen(spec, params):
  is_chosen = parameters.selector(spec)
  return {path for path in parameters.paths(params) if is_chosen(path)}


def test_groups_are_what_their_names_say(moe):
  everything = set(parameters.paths(moe))
  assert _chosen('', moe) == _chosen('all', moe) == everything
  sizes = {name: _chosen(name, moe) for name in parameters.GROUPS}
  assert all(sizes.values())
  assert {path.split('/')[-2] for path in sizes['router']} == {'router'}
  assert {path.split('/')[-1] for path in sizes['experts']} == {
    'w_in',
    'w_out',
    'b_in',
    'b_out',
  }
  # Two feed-forward layers in the encoder, one in each decoder.
  assert len(sizes['experts']) == 4 * 4
  assert len(sizes['router']) == 4
  assert sizes['feed_forward'] == sizes['experts'] | sizes['router']
  assert sizes['encoder'] | sizes['decoder'] | sizes['ctc'] == everything
  assert sizes['vocabulary'] >= sizes['ctc']
  parts = ('attention', 'convolution', 'feed_forward', 'norms', 'subsampling')
  covered = [sizes[part] for part in (*parts, 'vocabulary')]
  assert set.union(*covered) == everything
  # No two overlap, but for the norm inside of the convolution.
  twice = {p for p in everything if sum(p in part for part in covered) > 1}
  assert twice == {
    f'encoder/blocks/convolution/norm/{name}' for name in ('scale', 'bias')
  }


def test_names_join_and_are_taken_out(moe):
  both = _chosen('experts, router', moe)
  assert both == _chosen('experts', moe) | _chosen('router', moe)
  assert _chosen('-encoder', moe) == _chosen('decoder,ctc', moe)
  assert _chosen('encoder,-norms', moe).isdisjoint(_chosen('norms', moe))
  assert _chosen('-all,ctc/bias', moe) == {'ctc/bias'}
  assert _chosen('*/router/kernel', moe) == _chosen('router', moe)


def test_boxes_and_values_give_the_same_mask(moe):
  mask = parameters.mask('router')(moe)
  assert jax.tree.structure(mask) == jax.tree.structure(moe)
  assert sum(jax.tree.leaves(mask)) == 4


def test_what_matches_nothing_is_an_error(moe):
  parameters.require_known('experts,-*/ffn_final/*', moe)
  with pytest.raises(
    config_lib.ConfigError, match=r"'expert' .*experts, router"
  ):
    parameters.require_known('expert', moe)
  with pytest.raises(config_lib.ConfigError, match='nothing to train'):
    parameters.require_known('-encoder,-decoder,-ctc', moe)
  dense = directory.abstract_variables(tiny.model_config())['params']
  with pytest.raises(config_lib.ConfigError, match="'experts' matches no"):
    parameters.require_known('experts', dense)


def test_the_table_adds_up(moe):
  lines = parameters.table('router,ctc', moe).splitlines()
  rows = {}
  for line in lines[1:]:
    name, size, trained = line.replace(',', '').split()
    rows[name] = int(size), int(trained)
  total = rows.pop('all')
  assert total == tuple(map(sum, zip(*rows.values(), strict=True)))
  assert rows['ctc'][0] == rows['ctc'][1] > 0
  assert (
    0
    < rows['encoder/blocks/ffn_final'][1]
    < rows['encoder/blocks/ffn_final'][0]
  )
  assert rows['encoder/blocks/attention'][1] == 0
