"""The upcycling study from a request to tables and plots."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import time
from typing import Any
from typing import Literal

from data_pipelines import prepare
from experiments.reporting import expert_load
from experiments.reporting import metrics_log
from experiments.studies import budget
from experiments.studies import design
from experiments.studies import plots
from experiments.studies import running
from experiments.studies import tables
from experiments.wiring import preparing
from experiments.wiring import upcycling
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory

Form = Literal['quick', 'full']
# Dense updates, and those of what continues it.
_LENGTHS: Mapping[tuple[str, str], tuple[int, int]] = {
  ('quick', 'builtin'): (1700, 1000),
  ('quick', 'an4'): (1700, 1000),
  ('quick', 'shift'): (1700, 400),
  ('full', 'builtin'): (3000, 2000),
  ('full', 'an4'): (5000, 2000),
  ('full', 'shift'): (3000, 1000),
}
_SEEDS = {'quick': 1, 'full': 2}
# What stays in arm.json: too much to read.
_OF_ARMS = ('asked', 'errors')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is asked for; None: what the form has.

  Attributes:
    form: quick or full.
    config: of the dense training on the built-in corpus, as a tree.
    an4_config: of that on the recordings.
    growth: how the dense model gets experts.
    studies: of `design.STUDIES`; empty: those of the form that have data.
    seeds: how many.
    dense_steps: updates of (a).
    more_steps: updates of what continues it.
    every: updates between two points of a curve.
    balance: weight of the balance loss.
    rate: see `design.Recipe`.
    corpus: prepared built-in corpus; None: it is spoken into the work
      directory.
    an4: folder of manifests; None: no recordings.
    num_train: utterances to speak for training.
    num_test: utterances to speak for dev, and for test.
  """

  form: Form
  config: Mapping[str, Any]
  an4_config: Mapping[str, Any]
  growth: upcycling.Request
  studies: tuple[str, ...] = ()
  seeds: int | None = None
  dense_steps: int | None = None
  more_steps: int | None = None
  every: int = 100
  balance: float = 0.1
  rate: float = 0.5
  corpus: str | None = None
  an4: str | None = None
  num_train: int = 4000
  num_test: int = 300

  @property
  def chosen(self) -> tuple[str, ...]:
    """The studies, those first that others build on.

    Raises:
      config_lib.ConfigError: for one that there is not, or that lacks data.
    """
    default: tuple[str, ...] = ('builtin',)
    if self.form == 'full' and self.an4:
      default = design.STUDIES
    chosen = self.studies or default
    for name in chosen:
      if name not in design.STUDIES:
        raise config_lib.ConfigError(
          f'--studies: there is no {name!r}; there are '
          f'{", ".join(design.STUDIES)}'
        )
      if name != 'builtin' and not self.an4:
        raise config_lib.ConfigError(
          f'--studies={name} needs recordings; give --an4=FOLDER'
        )
    if 'shift' in chosen and 'builtin' not in chosen:
      raise config_lib.ConfigError(
        '--studies=shift starts from the dense model of builtin; add that one'
      )
    # In this order: `shift` starts from what `builtin` has trained.
    return tuple(name for name in design.STUDIES if name in chosen)

  def lengths(self, study: str) -> design.Lengths:
    """Updates of one study's arms."""
    dense, more = _LENGTHS[self.form, study]
    return design.Lengths(
      dense=dense if self.dense_steps is None else self.dense_steps,
      more=more if self.more_steps is None else self.more_steps,
      every=self.every,
    )

  def recipe(self, study: str) -> design.Recipe:
    """What the arms of a study have in common."""
    # `shift` continues the model of the built-in corpus, so it has its config.
    tree = self.an4_config if study == 'an4' else self.config
    config = config_lib.from_dict(config_lib.Config, tree)
    # Growing comes when (a) has trained; what it refuses is refused here.
    _ = self.growth.config(config.model), self.growth.change
    return design.Recipe(
      config=config,
      growth=self.growth,
      balance=self.balance,
      rate=self.rate,
      # A very short study must not be all warm-up.
      warmup=min(100, self.lengths(study).more // 4),
    )


def run(
  request: Request, workdir: pathlib.Path, *, say: Callable[[str], None] = print
) -> bool:
  """Prepares the corpus, runs all arms, writes tables and plots.

  Args:
    request: what is asked for.
    workdir: everything is written here.
    say: told what happens.

  Returns:
    False if a signal stopped it; the same call goes on.

  Raises:
    running.ReceiptError: if growing changes what the model computes.
    ValueError: for whatever cannot be used; says why.
  """
  corpora = dict(_corpora(request, workdir))
  arms = [
    arm
    # Seeds outside: the first one gives whole tables early.
    for seed in range(request.seeds or _SEEDS[request.form])
    for study in request.chosen
    for arm in design.arms(
      study, seed, request.recipe(study), request.lengths(study), corpora
    )
  ]
  # Behind the arms: what cannot be asked for shows before minutes of speaking.
  speaking = _prepare(request, corpora, workdir, say)

  def after(entries: Sequence[running.Entry]) -> None:
    spent = speaking + budget.minutes(entries)
    to_come = budget.minutes_to_come(entries, arms)
    verdict = budget.verdict(request.form, spent, to_come)
    say(f'  {verdict}')
    write(workdir, request, entries, verdict)

  if not running.run(arms, workdir, say=say, after=after):
    say('stopped; run again to continue')
    return False
  print((workdir / 'study.md').read_text(encoding='utf-8'))
  say(f'done: {workdir / "study.md"}')
  return True


def _corpora(
  request: Request, workdir: pathlib.Path
) -> Iterator[tuple[str, design.Corpus]]:
  if 'builtin' in request.chosen:
    folder = pathlib.Path(request.corpus or workdir / 'corpus').absolute()
    yield 'builtin', design.prepared(folder)
  if request.an4:
    yield 'an4', design.manifests(pathlib.Path(request.an4).absolute())


def _prepare(
  request: Request,
  corpora: Mapping[str, design.Corpus],
  workdir: pathlib.Path,
  say: Callable[[str], None],
) -> float:
  """Speaks the built-in corpus, unless one is given, or is there.

  Returns:
    Minutes that it took, all sittings together.
  """
  if request.corpus or 'builtin' not in corpora:
    return 0.0
  begun = time.monotonic()
  sizes = request.num_train, request.num_test
  say('corpus: {} + 2 x {} utterances of synthetic speech'.format(*sizes))
  prepare.prepare_builtin(
    corpora['builtin'].train,
    seed=0,
    num_train=request.num_train,
    num_dev=request.num_test,
    num_test=request.num_test,
  )
  # Speaking goes on where it was stopped, and its time adds up.
  file, before = workdir / 'corpus.json', 0.0
  if file.is_file():
    before = json.loads(file.read_text(encoding='utf-8'))['wall_seconds']
  seconds = round(before + time.monotonic() - begun, 1)
  preparing.write_json(file, {'wall_seconds': seconds})
  return seconds / 60


def write(
  workdir: pathlib.Path,
  request: Request,
  entries: Sequence[running.Entry],
  verdict: str,
) -> None:
  """Writes study.json, study.md and plots/ with what is known so far.

  Args:
    workdir: of the study.
    request: what was asked for.
    entries: of the arms that are done.
    verdict: on the time that it took.
  """
  record = {
    'form': request.form,
    'growth': dataclasses.asdict(request.growth),
    'balance_loss_weight': request.balance,
    'rate': request.rate,
    'wall_minutes_of_arms': round(budget.minutes(entries), 1),
    'arms': [
      {k: v for k, v in each.items() if k not in _OF_ARMS} for each in entries
    ],
  }
  preparing.write_json(workdir / 'study.json', record)
  parts = heading(request), tables.markdown(entries), f'Wall time: {verdict}.\n'
  _write(workdir / 'study.md', '\n'.join(parts).encode())
  for (study, seed), group in tables.groups(entries).items():
    folder = f'{study}-{seed}'
    _write(workdir / 'plots' / f'{folder}.png', plots.curves(group))
    for letter, entry in group.items():
      # Routers logged a load, so there are experts to draw.
      if 'load_low' in entry:
        arm = workdir / folder / letter
        log = metrics_log.read(arm / 'metrics.jsonl')
        blocks = directory.describe(arm / 'model').model.expert_blocks
        picture = expert_load.plot_over_training(log, blocks)
        _write(workdir / 'plots' / f'{folder}-{letter}-load.png', picture)


def heading(request: Request) -> str:
  """What was asked for, in words."""
  growth = request.growth
  lengths = '; '.join(
    f'{study}: {each.dense:,} and {each.more:,}'
    for study in request.chosen
    for each in (request.lengths(study),)
  )
  return (
    f'## Upcycling, {request.form} form\n\n'
    '(b), (d), (e) and (f) continue the average of the best checkpoints of '
    f'(a), with {request.rate:g} of its peak rate; (c) has the updates of (a) '
    f'and (b) together. Updates of (a), and of what continues it: {lengths}. '
    f'Experts: {growth.num_experts}, top-{growth.top_k}, where '
    f'{growth.where}. Balance loss: {request.balance:g}, none in (f). Curves '
    'and load over training: plots/.\n'
  )


def _write(file: pathlib.Path, content: bytes | None) -> None:
  if content is None:
    return
  file.parent.mkdir(parents=True, exist_ok=True)
  temporary = file.with_name(file.name + '.tmp')
  temporary.write_bytes(content)
  os.replace(temporary, file)
