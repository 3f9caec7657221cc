"""Which arms there are, and that they differ in what is compared only."""

import dataclasses

import pytest

from experiments.configs import quickstart_dense
from experiments.studies import design
from experiments.wiring import upcycling
from u2moe_jax import config as config_lib


@pytest.fixture
def recipe():
  tree = quickstart_dense.get_config().to_dict()
  return design.Recipe(
    config=config_lib.from_dict(config_lib.Config, tree),
    growth=upcycling.Request(num_experts=4),
  )


@pytest.fixture
def corpora(tmp_path):
  return {name: design.prepared(tmp_path, name) for name in ('builtin', 'an4')}


_LENGTHS = design.Lengths(dense=300, more=200)


def test_arms_stand_behind_what_they_start_from(recipe, corpora):
  letters = {}
  done = set()
  for study in design.STUDIES:
    arms = list(design.arms(study, 1, recipe, _LENGTHS, corpora))
    letters[study] = ''.join(arm.letter for arm in arms)
    for arm in arms:
      assert {arm.start, arm.like} - {''} <= done
      done.add(arm.folder)
    steps = {x.letter: x.config and x.config.train.num_steps for x in arms}
    assert steps['b'] == steps['d'] == steps['e'] == 200
  assert letters == {'builtin': 'abcdef', 'an4': 'abde', 'shift': 'abde'}


def test_a_shift_starts_where_the_first_corpus_ended(recipe, corpora):
  arms = list(design.arms('shift', 1, recipe, _LENGTHS, corpora))
  assert {arm.start for arm in arms} == {'builtin-1/a'}
  assert arms[0].config is None  # as it is
  for arm in arms:
    assert [corpus.name for corpus in arm.tests] == ['an4', 'builtin']


def test_arms_differ_in_what_is_compared_only(recipe, corpora):
  arms = list(design.arms('builtin', 1, recipe, _LENGTHS, corpora))
  by = {arm.letter: arm.config for arm in arms}
  balanced = {'balance_loss_weight': 0.1}
  for letter, changes in (
    ('d', balanced),
    ('e', balanced | {'trainable': 'experts,router'}),
    ('f', {}),
  ):
    train = dataclasses.replace(by['b'].train, **changes)
    assert by[letter] == dataclasses.replace(by['b'], train=train)
  assert by['b'].train.balance_loss_weight == 0
  # From scratch: the updates of both, the grown model, the data of (a).
  assert by['c'].train.num_steps == 300 + 200
  assert by['c'].model == recipe.growth.config(by['a'].model)
  assert by['a'].train.seed == by['c'].train.seed != by['b'].train.seed
  assert [x.letter for x in arms if x.has_experts] == ['c', 'd', 'e', 'f']
