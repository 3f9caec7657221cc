"""docs/configuration.md says what the code says."""

import dataclasses
import re

import pytest

from experiments.reporting import configuration
from u2moe_jax import config as config_lib
from u2moe_jax.interop import wenet_keys


def test_the_file_is_up_to_date():
  written = configuration.FILE.read_text(encoding='utf-8')
  assert written == configuration.text(), (
    'run python -m experiments.reporting.configuration'
  )


def _exists(key):
  node = config_lib.to_dict(config_lib.Config())
  for name in key.split('.'):
    if not isinstance(node, dict) or name not in node:
      return False
    node = node[name]
  return True


def test_every_key_of_ours_in_the_dictionary_exists():
  dictionary = configuration.text().partition('## From WeNet')[2]
  keys = re.findall(
    r'(?<![\w./])(?:model|data|optimizer|train|decode)\.[a-z_.]*[a-z]',
    dictionary,
  )
  keys = {key for key in keys if key != 'train.yaml' and '.py' not in key}
  assert len(keys) > 40
  assert [key for key in sorted(keys) if not _exists(key)] == []
  assert not _exists('model.encoder.nope')


def test_every_group_has_an_owner_and_all_tables():
  groups = set(wenet_keys.GROUPS)
  assert groups == set(wenet_keys.FIXED) == set(wenet_keys.IGNORED)
  for group, keys in wenet_keys.GROUPS.items():
    assert not set(keys) & set(wenet_keys.FIXED[group])
    assert not set(keys) & set(wenet_keys.IGNORED[group])


def test_a_key_without_a_meaning_is_refused():
  @dataclasses.dataclass(frozen=True)
  class Half:
    """Half of it.

    Attributes:
      told: what
        it is.
    """

    told: int = 1

  # Dedented by one level, as a class of its own file would be.
  Half.__doc__ = (Half.__doc__ or '').replace('\n  ', '\n')
  assert configuration.attributes(Half) == {'told': 'what it is.'}
  Half.__annotations__['untold'] = int
  with pytest.raises(ValueError, match='untold'):
    configuration.attributes(Half)
