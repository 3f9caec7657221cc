import base64
import html.parser
import re

import pytest

from experiments.reporting import report

PNG = b'\x89PNG\r\n\x1a\n and so on'


def _result(**changes):
  return {
    'mode': 'attention_rescoring',
    'context': 'full',
    'streaming': False,
    'wer': 3.125,
    'cer': 1.0,
    'rtf': 0.0214,
    'chunk_ms_p50': None,
    'chunk_ms_p95': None,
  } | changes


STREAMED = _result(
  context='chunk 16', streaming=True, chunk_ms_p50=12.34, chunk_ms_p95=20.0
)


def _write(path, **changes):
  arguments = {
    'title': 'A title',
    'results': [_result(), STREAMED],
    'figures': [report.Figure('Losses', PNG, 'A caption')],
    'facts': {'Tokens': '31'},
    'notes': ['A note'],
  }
  report.write_report(path, **(arguments | changes))
  return path.read_text(encoding='utf-8')


class _Checker(html.parser.HTMLParser):
  """Collects text and attributes; holds that elements nest."""

  def __init__(self):
    super().__init__()
    self.open, self.text, self.links = [], [], []

  def handle_starttag(self, tag, attrs):
    if tag not in ('meta', 'img'):
      self.open.append(tag)
    self.links += [v for k, v in attrs if k in ('src', 'href', 'srcset')]
    assert tag not in ('script', 'link', 'iframe', 'object')

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def _check(page):
  checker = _Checker()
  checker.feed(page)
  checker.close()
  assert not checker.open
  return checker


def test_table_for_a_terminal_is_aligned():
  lines = report.format_table([_result(), STREAMED]).splitlines()
  assert lines[0].split('  ')[0] == 'mode'
  assert len({len(line) for line in lines}) == 1
  assert [' '.join(line.split()) for line in lines[2:]] == [
    'attention_rescoring full offline 3.12 1.00 0.021 - -',
    'attention_rescoring chunk 16 streaming 3.12 1.00 0.021 12.3 20.0',
  ]


def test_no_latency_columns_without_streaming():
  assert 'p95' not in report.format_table([_result()])
  assert 'p95' in report.format_table([_result(), STREAMED])


@pytest.mark.parametrize(
  ('context', 'label'), [(-1, 'full'), (16, 'chunk 16'), ('whole', 'whole')]
)
def test_context_may_be_a_chunk_size(context, label):
  table = report.results_table([_result(context=context)])
  assert table.rows[0][1] == label


@pytest.mark.parametrize('value', [None, float('nan'), float('inf')])
def test_a_number_that_is_not_there_is_a_dash(value):
  assert report.results_table([_result(wer=value)]).rows[0][3] == '-'


def test_bands_are_a_second_table():
  assert report.snr_table([_result()]) is None
  banded = _result(wer_by_snr={'clean': 1.0, '5-10 dB': 9.876})
  other = _result(wer_by_snr={'clean': 2.0, '10-20 dB': None})
  table = report.snr_table([_result(), banded, other])
  assert table.header[3:] == ('clean', '5-10 dB', '10-20 dB')
  assert [row[3:] for row in table.rows] == [
    ('1.00', '9.88', '-'),
    ('2.00', '-', '-'),
  ]
  assert '9.88' in report.format_table([banded])


def test_no_results_give_an_empty_table(tmp_path):
  assert report.format_table([]).startswith('mode')
  page = _write(tmp_path / 'r.html', results=[], figures=[], facts={}, notes=[])
  _check(page)
  assert '<table' not in page


def test_page_stands_alone(tmp_path):
  png = tmp_path / 'a.png'
  png.write_bytes(PNG)
  figures = [report.Figure('One', PNG, ''), report.Figure('Two', png, 'Cap')]
  page = _write(tmp_path / 'r.html', figures=figures)
  checker = _check(page)
  data = 'data:image/png;base64,' + base64.b64encode(PNG).decode()
  assert checker.links == [data, data]
  assert not re.search(r'https?:|url\(|@import|<script', page)
  assert [p.name for p in sorted(tmp_path.iterdir())] == ['a.png', 'r.html']


def test_all_text_is_escaped(tmp_path):
  nasty = '<script>alert("&amp;")</script> {style} \'"'
  page = _write(
    tmp_path / 'r.html',
    title=nasty,
    results=[_result(mode=nasty, context=nasty, wer_by_snr={nasty: 1.0})],
    figures=[report.Figure(nasty, PNG, nasty)],
    facts={nasty: nasty},
    notes=[nasty],
  )
  checker = _check(page)  # no script element, everything nests
  # title, h1, fact twice, two tables' two labels, band, note, h2, caption
  assert ''.join(checker.text).count(nasty) == 12


def test_an_existing_report_is_replaced(tmp_path):
  _write(tmp_path / 'r.html', title='Old')
  page = _write(tmp_path / 'r.html', title='New')
  assert 'Old' not in page
