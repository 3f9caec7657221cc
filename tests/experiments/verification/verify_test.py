"""The verifier, end to end, on small copies of the golden cases."""

import json

from absl.testing import flagsaver
import jax
import numpy as np
import pytest

from experiments import verify_wenet
from experiments.verification import cases
from experiments.verification import port
from experiments.verification import registry
from experiments.verification import verify
from tests.reference import golden_folder
from tests.reference import made_case


@pytest.fixture(autouse=True)
def _settings():
  """The script changes how JAX compiles; other tests must not notice."""
  yield
  jax.config.update('jax_default_matmul_precision', None)
  jax.config.update('jax_disable_most_optimizations', False)


def _run(capsys, *folders):
  """Exit code, the rows, and the last line."""
  with flagsaver.flagsaver((verify_wenet._GOLDEN, list(map(str, folders)))):
    code = verify_wenet.main([])
  *rows, last = capsys.readouterr().out.strip().splitlines()
  return code, rows[1:], json.loads(last)


def test_a_whole_model(tmp_path, capsys):
  """Decoders, losses, gradients, batch statistics and every search."""
  name = 'u2pp_dense_noncausal_bn'
  golden_folder.write_model(tmp_path / name, name)
  code, rows, summary = _run(capsys, tmp_path / name)
  assert code == 0, [row for row in rows if 'FAIL' in row]
  assert summary['failed'] == 0
  assert summary['cases'] == 1
  assert summary['quantities'] == len(rows) > 250
  text = '\n'.join(rows)
  for quantity in (
    'config/n_params',
    'loss_l2r_no_smoothing',
    'grad_norm/decoder.right_decoder.after_norm.bias',
    'running_var',
    'attention_beam5_lenpen1.0 tokens',
    'attention_rescoring_beam5_ctc0.3_rev0.5 tokens_confidence',
    'decode_chunk4_left2_beam5_ctc0.5_rev0.3/attention_rescoring times',
  ):
    assert quantity in text


def test_streams_and_a_wrong_weight(tmp_path, capsys):
  """1e-2 on one weight is noticed, and only the numbers are at fault."""
  folder = golden_folder.write_model(tmp_path / 'good', 'enc_conv2d6')
  code, rows, _ = _run(capsys, folder)
  assert code == 0, rows
  assert any('stream_chunk4_left2_utt0' in row for row in rows)
  with np.load(folder / 'weights.npz') as file:
    weights = dict(file)
  name = 'encoder.encoders.1.conv_module.depthwise_conv.weight'
  weights[name][3, 0, 2] += 1e-2
  np.savez(folder / 'weights.npz', **weights)
  code, rows, summary = _run(capsys, folder)
  assert code == 1
  assert summary['failed'] >= 4
  assert summary['worst']['error'] > 2e-5
  assert any('encoder_mask' in row and 'pass' in row for row in rows)


def test_cases_of_a_folder_without_models(tmp_path, capsys):
  golden_folder.write_units(tmp_path / 'units')
  golden_folder.write_search(tmp_path / 'search', beams=[3])
  golden_folder.write_fbank(tmp_path / 'sound')
  (tmp_path / 'empty').mkdir()
  code, rows, summary = _run(capsys, tmp_path)
  assert code == 0, [row for row in rows if 'FAIL' in row]
  assert summary['cases'] == 3
  text = '\n'.join(rows)
  for quantity in (
    'peaky.beam3.context nbest_finalize_score',
    'flat.beam3.context intended nbest',
    'context_walks step_scores',
    'warmuplr_used lr=0.001 warmup=0',
    'fbank/a-1 largest',
  ):
    assert quantity in text


def test_names_and_numbers_of_a_case_never_seen(tmp_path, capsys):
  folder = made_case.write(tmp_path / 'made')
  code, rows, summary = _run(capsys, folder)
  assert code == 0, rows
  assert summary['quantities'] == 13
  # The chunk size stands in the name: another one has other caches.
  with np.load(folder / 'io.npz') as file:
    arrays = dict(file)
  arrays['stream_chunk2_left1_utt0'] = arrays.pop('stream_chunk3_left1_utt0')
  np.savez(folder / 'io.npz', **arrays)
  code, rows, _ = _run(capsys, folder)
  assert code == 1
  assert 'FAIL' in next(row for row in rows if 'stream_chunk2' in row)


def _units(tmp_path, change):
  """Failing rows of some of the units, after a change of arrays or results."""
  folder = golden_folder.write_units(tmp_path / 'units')
  (case,) = cases.discover(folder)
  arrays = {
    name: array
    for name, array in case.arrays.items()
    if name.startswith(('chunk_mask', 'sinusoid'))
  }
  results = {'conv2d': case.results['conv2d']}
  case.tree.update(io=arrays, results=results)
  change(arrays, results)
  return [row for row in verify.rows(case) if not row.passed]


@pytest.mark.parametrize(
  ('file', 'key', 'value'),
  [
    ('io', 'unknown_array', np.zeros(3)),
    ('io', 'chunk_mask_size10_chunk4', np.zeros((10, 10), bool)),
    ('results', 'unknown', 1.0),
    ('results', 'peaks_of_tokens', {'inside': [1, 2]}),
    ('results', 'nothing', {}),
  ],
)
def test_what_no_check_knows_has_failed(tmp_path, file, key, value):
  failed = _units(
    tmp_path,
    lambda io, results: {'io': io, 'results': results}[file].update(
      {key: value}
    ),
  )
  assert len(failed) == 1
  assert failed[0].quantity.startswith(f'{file}/{key}')


def test_nan_and_another_shape_have_failed(tmp_path):
  first, some = 'sinusoid_pe_d16_first40', 'sinusoid_pe_d64_pos_0_1_100_4999'

  def change(io, _):
    io[first] = np.full_like(io[first], np.nan)
    io[some] = io[some][:, :8]

  failed = {row.quantity for row in _units(tmp_path, change)}
  assert failed == {f'io/{first}', f'io/{some}'}


def test_an_unknown_field_of_an_utterance_has_failed(tmp_path):
  folder = golden_folder.write_search(tmp_path / 'search', beams=[1])
  (case,) = cases.discover(folder)
  case.tree['results'] = {
    key: case.results[key] for key in ('peaky.greedy', 'peaky.beam1')
  }
  case.tree['results']['peaky.beam1'][0]['mood'] = 'good'
  failed = [row for row in verify.rows(case) if not row.passed]
  assert [row.quantity for row in failed] == ['results/peaky.beam1 mood']


def test_an_error_in_a_check_is_a_failed_row(tmp_path):
  folder = golden_folder.write_units(tmp_path / 'units')
  (case,) = cases.discover(folder)

  def broken(subject, quantity):
    raise RuntimeError('two\nlines')

  rules = [registry.Rule('io/moe_y', broken), registry.Rule('.+/.+', None)]
  (row,) = registry.verify(port.Port(case), rules)
  assert not row.passed
  assert row.note == 'RuntimeError: two lines'


def test_folders_that_are_no_cases(tmp_path):
  with pytest.raises(cases.CaseError, match='no case here'):
    cases.discover(tmp_path)
  with pytest.raises(cases.CaseError, match='no such folder'):
    cases.discover(tmp_path / 'none')
  (tmp_path / 'io.npz').write_text('no zip')
  with pytest.raises(cases.CaseError, match=r'io\.npz: not a readable'):
    cases.discover(tmp_path)
