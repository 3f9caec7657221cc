"""The arms of the upcycling study: what each starts from and how it trains.

Within a study the arms that continue one dense model share everything that is
not compared: the model they start from (the average of its best checkpoints),
the order of the data, the number of updates and the schedule, a short warm-up
to half of the dense training's rate and a cosine down. The dense training ends
its own cosine first, so it is a finished model, and no arm goes on with its
moments.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import math
import pathlib
from typing import Any

from experiments.wiring import upcycling
from u2moe_jax import config as config_lib

# What UME trains when it freezes the rest.
FROZEN_ARM_TRAINS = 'experts,router'
TITLES = {
  'a': 'dense',
  'b': 'dense, continued',
  'c': 'MoE from scratch',
  'd': 'UME, all train',
  'e': 'UME, experts and routers train',
  'f': 'UME, no balance loss',
}
LETTERS = {'builtin': 'abcdef', 'an4': 'abde', 'shift': 'abde'}
STUDIES = tuple(LETTERS)
_GROWN = 'def'
_WITH_EXPERTS = f'c{_GROWN}'
# Epochs in short-first order help a fresh model only.
_CONTINUED = {'data.short_first_epochs': 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """What arms are trained and tested on.

  Attributes:
    name: for people.
    train: source of the training utterances (`data_pipelines.sources`).
    dev: source for the curves.
    test: source to report on.
  """

  name: str
  train: str
  dev: str
  test: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
  """Updates of the arms of one study.

  Attributes:
    dense: of the dense training.
    more: of each arm that continues it.
    every: between two points of the curves; divides both. Those of the dense
      training, which only has to be finished, are twice as far apart.
  """

  dense: int
  more: int
  every: int = 100

  def __post_init__(self):
    for name in ('dense', 'more'):
      steps = getattr(self, name)
      if steps < self.every or steps % self.every:
        raise config_lib.ConfigError(
          f'{name}={steps} updates must be a multiple of the {self.every} '
          'between two points of the curves'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """What all arms of a study have in common.

  Attributes:
    config: of the dense training; data and lengths are filled in.
    growth: how the dense model gets experts; (c) has the same ones.
    balance: weight of the balance loss, but for (f).
    rate: peak rate of what continues, as a share of the dense training's.
    warmup: updates of its warm-up.
  """

  config: config_lib.Config
  growth: upcycling.Request
  balance: float = 0.1
  rate: float = 0.5
  warmup: int = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """One training, or a model as it is.

  Attributes:
    study: one of `STUDIES`.
    seed: of its study.
    letter: a key of `TITLES`.
    config: of the training, without what the start decides; None: no training.
    decode: how its model is decoded.
    tests: corpora that it is tested on; the first has the curve.
    start: folder of the arm it starts from; empty: random weights.
    like: folder of the arm whose tokens and CMVN it takes; empty: its own.
    growth: how its start gets experts first; None: not at all.
  """

  study: str
  seed: int
  letter: str
  config: config_lib.Config | None
  decode: config_lib.DecodeConfig
  tests: tuple[Corpus, ...]
  start: str = ''
  like: str = ''
  growth: upcycling.Request | None = None

  @property
  def folder(self) -> str:
    """Its work directory, in that of the study."""
    return f'{self.study}-{self.seed}/{self.letter}'

  @property
  def title(self) -> str:
    """What it is, in words."""
    return f'({self.letter}) {TITLES[self.letter]}'

  @property
  def has_experts(self) -> bool:
    """Whether its model has experts."""
    return self.letter in _WITH_EXPERTS


def arms(
  study: str,
  seed: int,
  recipe: Recipe,
  lengths: Lengths,
  corpora: Mapping[str, Corpus],
) -> Iterator[Arm]:
  """The arms of a study, each behind the one that it starts from.

  Args:
    study: `builtin` has all; `an4` those that need no training from scratch;
      `shift` continues the dense model of `builtin` on `an4`, and its (a) is
      that model as it is.
    seed: of weights and data order.
    recipe: see there.
    lengths: see there.
    corpora: by name.
  """
  names = ('an4', 'builtin') if study == 'shift' else (study,)
  tests = tuple(corpora[name] for name in names)
  # For `shift` that of builtin, for the others their own (a).
  start = f'{names[-1]}-{seed}/a'
  config = _on(recipe.config, tests[0], lengths)
  configs = _configs(config, seed, recipe, lengths)
  for letter in LETTERS[study]:
    is_dense = letter == 'a'
    # The (a) of `shift` is a finished model: it trains nothing.
    is_fresh = letter == 'c' or (is_dense and study != 'shift')
    yield Arm(
      study=study,
      seed=seed,
      letter=letter,
      config=configs[letter] if is_fresh or not is_dense else None,
      decode=recipe.config.decode,
      tests=tests,
      start='' if is_fresh else start,
      # With the same tokens and CMVN all arms of a study see the same task.
      like='' if is_dense else start,
      growth=recipe.growth if letter in _GROWN else None,
    )


def _configs(
  config: config_lib.Config, seed: int, recipe: Recipe, lengths: Lengths
) -> dict[str, config_lib.Config]:
  """The training of each arm; a start brings its own model."""
  balance = {'train.balance_loss_weight': recipe.balance}
  # (c) gets the updates of the dense model and of what continues it.
  both = _fresh(seed, lengths.dense + lengths.more)
  scratch = _changed(config, both | balance)
  more = _changed(config, _continued(seed, recipe, lengths.more))
  balanced = _changed(more, balance)
  return {
    'a': _changed(
      config,
      _fresh(seed, lengths.dense) | {'train.save_every': 2 * lengths.every},
    ),
    'b': more,
    'c': dataclasses.replace(
      scratch, model=recipe.growth.config(scratch.model)
    ),
    'd': balanced,
    'e': _changed(balanced, {'train.trainable': FROZEN_ARM_TRAINS}),
    # (f) trains as (b) does; what differs is its start, which has experts.
    'f': more,
  }


def _on(
  config: config_lib.Config, corpus: Corpus, lengths: Lengths
) -> config_lib.Config:
  return _changed(
    config,
    {
      'data.train': corpus.train,
      'data.dev': corpus.dev,
      'optimizer.schedule': 'cosine',
      'train.save_every': lengths.every,
      # A divisor of `save_every`: each point of a curve then has a line that
      # tells how long it took to get there.
      'train.log_every': math.gcd(20, lengths.every),
      # The averages of all arms are of as many checkpoints.
      'train.average_best': 3,
      'train.keep_last': 1,
      'train.idle_expert_steps': 200,
    },
  )


def _fresh(seed: int, steps: int) -> dict[str, Any]:
  return {'train.seed': 777 + seed, 'train.num_steps': steps}


def _continued(seed: int, recipe: Recipe, steps: int) -> dict[str, Any]:
  """Another order of the data than the dense model has seen."""
  return _CONTINUED | {
    'train.seed': 1777 + seed,
    'train.num_steps': steps,
    'optimizer.learning_rate': (
      recipe.rate * recipe.config.optimizer.learning_rate
    ),
    'optimizer.warmup_steps': recipe.warmup,
  }


def _changed(
  config: config_lib.Config, changes: Mapping[str, Any]
) -> config_lib.Config:
  for path, value in changes.items():
    config = config_lib.replace(config, path, value)
  return config


def prepared(folder: pathlib.Path, name: str = 'builtin') -> Corpus:
  """A prepared folder, which has all splits."""
  return Corpus(name=name, train=str(folder), dev=str(folder), test=str(folder))


def manifests(folder: pathlib.Path, name: str = 'an4') -> Corpus:
  """A folder with train.jsonl, dev.jsonl and test.jsonl.

  Raises:
    config_lib.ConfigError: if one is missing.
  """
  files = {
    split: folder / f'{split}.jsonl' for split in ('train', 'dev', 'test')
  }
  for file in files.values():
    if not file.is_file():
      raise config_lib.ConfigError(
        f'{file}: no such manifest; the folder needs train.jsonl, dev.jsonl '
        'and test.jsonl'
      )
  return Corpus(
    name=name, **{split: str(file) for split, file in files.items()}
  )
