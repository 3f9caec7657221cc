"""Curves, expert load and utterance plots, on made-up data."""

import math

import matplotlib
import numpy as np
import pytest

from experiments.reporting import curves
from experiments.reporting import drawing
from experiments.reporting import expert_load
from experiments.reporting import metrics_log
from experiments.reporting import utterance

PNG_START = b'\x89PNG\r\n\x1a\n'


def _log(num_windows=30, *, num_experts=4, **more):
  """A run; the second of three final layers sends all to expert 1."""
  generator = np.random.default_rng(0)
  load = np.full((3, num_experts), 1 / num_experts)
  load[1] = np.eye(num_experts)[0]
  records = [
    {
      'step': 20 * i + 1,
      'loss': 100 / (i + 1) + generator.random(),
      'loss_ctc': 150 / (i + 1),
      'learning_rate': 1e-3,
      'gradient_norm': 5.0,
      'audio_seconds_per_second': 40.0,
      'load/encoder.final': load.tolist(),
      'load/encoder.macaron': load[:1].tolist(),
      'entropy/encoder.final': [1.0, 0.5, 1.2],
    }
    | more
    for i in range(num_windows)
  ]
  dev = [{'step': 100, 'loss': 2.0, 'wer': 12.5}]
  return metrics_log.MetricsLog({'train': records, 'dev': dev})


EMPTY = metrics_log.MetricsLog({'train': [], 'dev': []})
CURVES = [curves.plot_losses, curves.plot_optimizer, curves.plot_throughput]


def _is_picture(png):
  return png.startswith(PNG_START) and len(png) > 2000


@pytest.mark.parametrize('plot', [*CURVES, expert_load.plot_over_training])
@pytest.mark.parametrize('num_windows', [1, 30])
def test_a_run_gives_pictures(plot, num_windows):
  assert _is_picture(plot(_log(num_windows)))


@pytest.mark.parametrize('plot', [*CURVES, expert_load.plot_over_training])
def test_nothing_logged_gives_none(plot):
  assert plot(EMPTY) is None


def test_a_loss_that_is_never_finite_gives_none():
  log = _log(3, loss='nan', loss_ctc='inf')
  assert curves.plot_losses(log) is None


def test_recent_load_is_over_the_last_windows_in_forward_order():
  log = _log()
  log.records['train'][0]['load/encoder.final'] = [[9.0] * 4] * 3
  load = expert_load.recent_load(log, num_windows=5)
  assert list(load) == ['encoder.macaron', 'encoder.final']
  np.testing.assert_allclose(load['encoder.final'].sum(axis=1), 1)


def test_least_balanced_layer_is_found():
  load = expert_load.recent_load(_log())
  assert expert_load.least_balanced(load) == ('encoder.final', 1)


@pytest.mark.parametrize('num_experts', [1, 4, 40])
def test_heat_map_takes_any_number_of_experts(num_experts):
  load = expert_load.recent_load(_log(2, num_experts=num_experts))
  load['forward_decoder.ffn'] = np.full((2, 2), 0.5)
  assert _is_picture(expert_load.plot_heat_map(load))
  assert expert_load.plot_heat_map({}) is None


def test_blocks_and_experts_have_the_numbers_of_the_alarm(monkeypatch):
  """Of experts in blocks 1, 3 and 5; row 1 of the load is block 3."""
  drawn = []
  to_png = drawing.to_png
  monkeypatch.setattr(
    drawing, 'to_png', lambda figure: drawn.append(figure) or to_png(figure)
  )
  blocks = {'encoder.final': (1, 3, 5), 'encoder.macaron': (1, 3, 5)}
  log = _log()
  expert_load.plot_heat_map(expert_load.recent_load(log), blocks)
  expert_load.plot_over_training(log, blocks)
  expert_load.plot_over_training(log)
  heat_map, over_training, unknown = drawn
  final = heat_map.axes[1]
  rows = [f'encoder.final {block}' for block in blocks['encoder.final']]
  assert [x.get_text() for x in final.get_yticklabels()] == rows
  columns = [x.get_text() for x in final.get_xticklabels()]
  assert columns == ['0', '1', '2', '3']
  assert (
    over_training.axes[0].get_title('left').endswith('encoder.final, block 3')
  )
  assert unknown.axes[0].get_title('left').endswith('encoder.final, block 1')
  legend = over_training.axes[0].get_legend()
  names = [text.get_text() for text in legend.get_texts()]
  assert names == ['expert 0', '1', '2', '3']


def test_plotting_leaves_no_style_behind():
  before = dict(matplotlib.rcParams)
  curves.plot_losses(_log(2))
  assert dict(matplotlib.rcParams) == before


def test_a_token_without_a_glyph_has_another_label():
  assert drawing.printable('A', '#3') == 'A'
  assert drawing.printable('▁', '#3') == '▁'
  assert drawing.printable('你', '#3') == '#3'
  assert drawing.printable('', '#3') == '#3'


def _inspection(path, *, vocab=9, num_experts=3):
  """An inspection whose best path is `path`, each frame with p = 0.9."""
  probs = np.full((len(path), vocab), 0.1 / (vocab - 1))
  probs[np.arange(len(path)), path] = 0.9
  index = np.arange(2 * len(path)).reshape(2, -1) % num_experts
  return utterance.Inspection(
    log_probs=np.log(probs),
    expert_index={'encoder.macaron': index, 'encoder.final': index},
    expert_blocks={'encoder.macaron': (0, 1), 'encoder.final': (1, 3)},
    text='',
    frame_seconds=0.04,
    tokens=('<blank>', '$', '▁', *'$BCDEF')[:vocab],
    blank_id=0,
    num_experts=num_experts,
  )


def test_best_path_merges_repeats_and_drops_blanks():
  log_probs = _inspection([0, 3, 3, 0, 3, 5, 5, 0]).log_probs
  path = utterance.best_path(log_probs, blank_id=0)
  assert path == [(3, 1), (3, 4), (5, 5)]


def test_rows_are_the_tokens_that_occur_as_they_appear():
  seen = _inspection([0, 7, 0, 3, 8, 1, 2, 5, 7, 0])
  assert utterance.occurring_tokens(seen) == [7, 3, 8, 1, 2, 5]


def test_an_utterance_of_blanks_still_has_rows():
  rows = utterance.occurring_tokens(_inspection([0, 0, 0]))
  assert len(rows) == 6
  assert 0 not in rows


@pytest.mark.parametrize('length', [1, 50, 1300])
def test_an_utterance_gives_pictures(length):
  seen = _inspection([0, 4, 0, 5, 1] * math.ceil(length / 5))
  assert _is_picture(utterance.plot_ctc(seen))
  assert _is_picture(utterance.plot_experts(seen))


def test_no_frames_give_none():
  seen = _inspection([])
  assert utterance.plot_ctc(seen) is None
  assert utterance.plot_experts(seen) is None
