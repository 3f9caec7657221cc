"""Makes the plots and the report of a work directory."""

from collections.abc import Mapping
from collections.abc import Sequence
import os
import pathlib

import numpy as np

from experiments.reporting import curves
from experiments.reporting import expert_load
from experiments.reporting import metrics_log
from experiments.reporting import report
from experiments.reporting import utterance
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.models import u2

# File under plots/ to (PNG or None, title, caption).
_Plots = dict[str, tuple[bytes | None, str, str]]
Example = tuple[str, np.ndarray, str]


def build(
  workdir: str | os.PathLike[str],
  *,
  recognizer: recognizer_lib.Recognizer | None,
  example: Example | None,
  results: Sequence[report.Result],
  title: str = 'U2++ speech recognition: training and results',
  facts: Mapping[str, str] | None = None,
  notes: Sequence[str] = (),
) -> pathlib.Path:
  """Writes `plots/*.png` and `report.html`.

  Args:
    workdir: a work directory; without `metrics.jsonl` there are no curves.
    recognizer: the model; None leaves out what needs it.
    example: name, samples (as `recognizer.load` gives them) and reference of
      the utterance to look into.
    results: see `report.results_table`.
    title: heading.
    facts: shown behind the model's own.
    notes: paragraphs below the table.

  Returns:
    The path of the report.
  """
  workdir = pathlib.Path(workdir)
  plots: _Plots = {}
  notes = list(notes)
  log = _read_log(workdir / 'metrics.jsonl')
  if log is None:
    notes.append('There is no metrics.jsonl here, so there are no curves.')
  else:
    model = recognizer and recognizer.description.model
    plots |= _training_plots(log, model.expert_blocks if model else None)
    if log.num_unreadable:
      notes.append(f'Unreadable lines in metrics.jsonl: {log.num_unreadable}.')
  if recognizer is not None and example is not None:
    plots |= _utterance_plots(recognizer, example)
  path = workdir / 'report.html'
  report.write_report(
    path,
    title=title,
    results=results,
    figures=_save(plots, workdir / 'plots'),
    # The caller's facts win.
    facts=_facts(recognizer, log) | dict(facts or {}),
    notes=notes,
  )
  return path


def _read_log(path: pathlib.Path) -> metrics_log.MetricsLog | None:
  try:
    return metrics_log.read(path)
  except FileNotFoundError:
    return None


def _training_plots(
  log: metrics_log.MetricsLog, blocks: expert_load.Blocks | None
) -> _Plots:
  faint = 'Faint: every logged window. Strong: their moving average.'
  return {
    'losses': (
      curves.plot_losses(log),
      'Losses',
      f'{faint} Dots: on the dev set, full context, nothing augmented; so '
      'they may lie below the training curves.',
    ),
    'optimizer': (
      curves.plot_optimizer(log),
      'Learning rate and gradient norm',
      f'The rate of each window is the mean of its updates. {faint}',
    ),
    'throughput': (
      curves.plot_throughput(log),
      'Speed of training',
      f'Seconds of sound trained on per second of time. {faint}',
    ),
    'expert_load': (
      expert_load.plot_heat_map(expert_load.recent_load(log), blocks),
      'Expert load',
      'What share of its frames (encoder) or tokens (decoders) a layer sent '
      'to each expert, over the last ten logged windows. White is an equal '
      'share, blue less, red more. With several experts per frame, each '
      'choice counts alike.',
    ),
    'expert_load_over_training': (
      expert_load.plot_over_training(log, blocks),
      'Expert load over training',
      'Above: the least balanced layer, a line per expert, moving average. '
      'Below: how undecided the routers are. Dashed: equal shares, and a router that does not care.',
    ),
  }


def _utterance_plots(
  recognizer: recognizer_lib.Recognizer, example: Example
) -> _Plots:
  name, samples, reference = example
  seen = utterance.inspect(recognizer, samples)
  return {
    'ctc_posteriors': (
      utterance.plot_ctc(seen),
      'One utterance: CTC posteriors',
      f'{name}: “{reference}”; the best path reads “{seen.text}”. Tokens '
      'stand in the order of their first appearance.',
    ),
    'experts_per_frame': (
      utterance.plot_experts(seen),
      'One utterance: experts',
      'The first expert each layer of the encoder chose for each frame. '
      'Numbers are names: expert 1 of two layers have nothing in common.',
    ),
  }


def _save(plots: _Plots, folder: pathlib.Path) -> list[report.Figure]:
  """Writes the plots there are; the others lacked their data."""
  folder.mkdir(parents=True, exist_ok=True)
  figures = []
  for name, (png, title, caption) in plots.items():
    path = folder / f'{name}.png'
    if png is None:
      path.unlink(missing_ok=True)  # of an earlier run
      continue
    path.write_bytes(png)
    figures.append(report.Figure(title, png, caption))
  return figures


def _facts(
  recognizer: recognizer_lib.Recognizer | None,
  log: metrics_log.MetricsLog | None,
) -> dict[str, str]:
  facts: dict[str, str] = {}
  if recognizer is not None:
    facts |= _model_facts(recognizer)
  # From the log, not the config: a run that was stopped has fewer.
  losses = None if log is None else log.series('train', 'loss')
  if losses is not None and len(losses):
    facts['Trained'] = f'{losses.steps[-1]:,} updates'
  return facts


def _model_facts(recognizer: recognizer_lib.Recognizer) -> dict[str, str]:
  model = recognizer.description.model
  encoder, decoder, moe = model.encoder, model.decoder, model.encoder.moe
  total, active = u2.count_params(model)
  facts = {
    'Encoder': f'{encoder.num_blocks} Conformer blocks, width '
    f'{encoder.model_dim}, {encoder.subsampling}',
    'Decoders': f'{decoder.num_blocks} blocks left-to-right, '
    f'{decoder.num_reverse_blocks} right-to-left',
    'Experts': f'{moe.num_experts} per layer, {moe.top_k} per frame '
    f'({moe.router_type})'
    if moe.num_experts
    else 'none, dense',
    'Parameters': f'{total / 1e6:.1f} M, {active / 1e6:.1f} M active',
    'Tokens': f'{model.vocab_size}',
  }
  provenance = recognizer.description.provenance
  versions = provenance.get('versions', {})
  if versions:
    facts['Made with'] = ', '.join(f'{k} {v}' for k, v in versions.items())
  if 'device' in provenance:
    facts['Trained on'] = str(provenance['device'])
  return facts
