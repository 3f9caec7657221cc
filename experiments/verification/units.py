"""Single functions: masks, lengths, positions, smoothing, MoE, rates, times."""

from collections.abc import Iterator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from experiments.verification import compare
from experiments.verification import port as port_lib
from experiments.verification import registry
from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.decoding import alignment
from u2moe_jax.layers import moe
from u2moe_jax.layers import positional
from u2moe_jax.layers import subsampling
from u2moe_jax.ops import ctc
from u2moe_jax.ops import losses
from u2moe_jax.ops import masks
from u2moe_jax.training import optimizer

_FRAME_SECONDS = 0.04  # of the time stamps
_RATE = 1e-6  # of the peak learning rate: float32 against float64
_LEAST_P = 1e-4  # of the chi-square test


def _chunk_mask(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  ours = masks.chunk_mask(
    quantity.integer('size', 0),
    chunk_size=quantity.integer('chunk', 0),
    left_chunks=quantity.integer('left', -1),
  )
  yield compare.equal(quantity.path, ours, quantity.value)


def _causal_mask(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  ours = masks.causal_mask(quantity.integer('size', 0))
  yield compare.equal(quantity.path, ours, quantity.value)


def _pad_mask(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """True means padding in this one, and in no mask of ours."""
  lengths = jnp.array(_integers(quantity.text('lengths')))
  ours = masks.length_mask(lengths, max_length=quantity.value.shape[1])
  yield compare.equal(quantity.path, ~np.asarray(ours), quantity.value)


def _integers(text: str) -> list[int]:
  return [int(part) for part in text.split('_')]


def _output_lengths(port: port_lib.Port, quantity) -> Iterator[compare.Row]:
  """Frames after subsampling; the reference raises where there is none."""
  geometry = subsampling.geometry(quantity.text('kind'))
  inputs = np.arange(
    quantity.integer('first', 0), quantity.integer('last', 0) + 1
  )
  ours = geometry.output_length(inputs)
  if quantity.text('form') == 'conv':
    # Where the reference raises, the case has -1.
    ours = np.where(ours == 0, -1, ours)
  yield compare.equal(quantity.path, ours, quantity.value)


def _subsampling(port: port_lib.Port, quantity) -> Iterator[compare.Row]:
  geometry = subsampling.geometry(quantity.text('kind'))
  ours = {
    'subsampling_rate': geometry.rate,
    'right_context': geometry.right_context,
  }[quantity.text('part')]
  yield compare.equal(quantity.path, ours, quantity.value)


def _positions(quantity: registry.Quantity) -> np.ndarray:
  """The first n positions, or listed ones."""
  if quantity.names.get('listed'):
    return np.array(_integers(quantity.text('listed')), np.int32)
  return np.arange(quantity.integer('first', 0), dtype=np.int32)


def _angle_tolerance(positions: np.ndarray) -> float:
  """Both sides round the angle, up to the position itself, to float32."""
  return compare.ENCODER + float(positions.max()) * 2.0**-23


def _sinusoids(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  positions = _positions(quantity)
  ours = positional.sinusoids(
    jnp.asarray(positions)[None], width=quantity.integer('width', 0)
  )[0]
  yield compare.close(
    quantity.path, ours, quantity.value, _angle_tolerance(positions)
  )


def _rotations(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  positions = _positions(quantity)
  turn = positional.rotation(
    jnp.asarray(positions)[None], head_dim=quantity.integer('width', 0)
  )
  ours = np.stack([turn.cos[0], turn.sin[0]], axis=-1)  # [T, K/2, 2]
  yield compare.close(
    quantity.path, ours, quantity.value, _angle_tolerance(positions)
  )


def _label_smoothing(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  arrays = port.case.arrays
  targets = jnp.asarray(arrays['ls_target'], jnp.int32)
  mask = targets >= 0
  total = losses.label_smoothed_kl(
    jax.nn.log_softmax(jnp.asarray(arrays['ls_logits'])),
    targets,
    mask,
    smoothing=quantity.number('smoothing', 0.0),
  ).sum()
  by_token = quantity.text('by_token') == 'True'
  ours = total / (mask.sum() if by_token else len(targets))
  yield compare.close(quantity.path, ours, quantity.value, compare.LOG_PROBS)


def _moe(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """One layer; the case does not say its top-k, so the one that fits counts."""
  params = _moe_params(port.case.arrays)
  num_experts = len(params['w_in'])
  likely = port.case.results.get('moe_top_k', 2)
  others = [k for k in range(1, num_experts + 1) if k != likely]
  best = None
  # The likely one first: mostly the others need not be compiled.
  for top_k in [min(likely, num_experts), *others]:
    ours = _apply_moe(params, port.case.arrays['moe_x'], top_k)
    row = compare.close(quantity.path, ours, quantity.value, compare.ENCODER)
    if best is None or row.error < best.error:
      best = row
    if best.passed:
      break
  assert best is not None
  yield best


def _moe_params(arrays: Mapping[str, np.ndarray]):
  """The reference's linear layers are (out, in)."""
  num_experts = arrays['moe_w.gate.weight'].shape[0]

  def stacked(part, form=np.asarray):
    names = [f'moe_w.experts.{e}.{part}' for e in range(num_experts)]
    return jnp.stack([form(arrays[name]) for name in names])

  return {
    'router': {'kernel': jnp.asarray(arrays['moe_w.gate.weight'].T)},  # [D, E]
    'w_in': stacked('w_1.weight', np.transpose),  # [E, D, M]
    'b_in': stacked('w_1.bias'),  # [E, M]
    'w_out': stacked('w_2.weight', np.transpose),  # [E, M, D]
    'b_out': stacked('w_2.bias'),  # [E, D]
  }


def _apply_moe(params: PyTree, x: np.ndarray, top_k: int):
  num_experts, _, hidden = params['w_in'].shape
  layer = moe.MoeFeedForward(
    config_lib.MoeConfig(num_experts=num_experts, top_k=top_k),
    hidden,
    activation='swish',
  )
  mask = jnp.ones(x.shape[:2], bool)
  return jax.jit(layer.apply)({'params': params}, jnp.asarray(x), mask)[0]


def _warmup(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Rates by update. The reference's first two updates are both its t = 1."""
  for case in quantity.value:
    peak, warmup = case['lr'], case['warmup_steps']
    schedule = optimizer.make_schedule(
      config_lib.OptimizerConfig(learning_rate=peak, warmup_steps=warmup),
      num_steps=1,
    )
    used = case['used_at_update_1_to_N']
    # Entry i is update i + 1, which has t = max(i, 1) there; ours counts
    # updates from 0, and has t = update + 1.
    updates = np.maximum(np.arange(len(used)) - 1, 0)
    yield compare.close(
      f'{quantity.path} lr={peak} warmup={warmup}',
      schedule(jnp.asarray(updates)),
      used,
      _RATE * peak,
    )


def _collapse(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """What a frame-wise path reads, and the first frame of each run."""
  tokens, times, _ = _peaks(port)
  ours = {'collapsed': tokens, 'peaks': times}[quantity.text('part')]
  yield compare.equal_lists(quantity.path, ours, quantity.value)


def _peaks(port: port_lib.Port):
  frames = jnp.asarray([port.case.results['peaks']['frames']])
  # For time stamps the reference takes the first frame of a run; its searches
  # take the last.
  tokens, lengths, times = ctc.collapse(
    frames, jnp.ones(frames.shape, bool), blank_id=0, time='first'
  )
  count = int(lengths[0])
  return tokens[0, :count].tolist(), times[0, :count].tolist(), frames.size


def _spans(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  _, times, num_frames = _peaks(port)
  longest = quantity.names.get('longest') or '1'
  ours = alignment.token_spans(
    times,
    num_frames=num_frames,
    frame_seconds=_FRAME_SECONDS,
    # A dot in a file's key is written as p: `0p3`.
    max_seconds=float(longest.replace('p', '.')),
  )
  yield compare.close(quantity.path, ours, quantity.value, 1e-6)


def _chunk_draws(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Drawn chunk sizes against the exact distribution of ours."""
  length = quantity.integer('length', 2)
  shares: dict[int, float] = {}
  # Every draw is as likely, so counting them gives the shares.
  for draw in range(1, length):
    full, chunk = masks.chunk_of_draw(
      draw, length, max_chunk=quantity.integer('largest', 1)
    )
    # Full context is told as a chunk of all frames.
    size = length if full else chunk
    shares[size] = shares.get(size, 0.0) + 1 / (length - 1)
  counts = {int(size): n for size, n in quantity.value.items()}
  yield _chi_square(quantity, counts, shares)


def _chi_square(
  quantity: registry.Quantity, counts: dict[int, int], shares: dict[int, float]
) -> compare.Row:
  """The error is -log10 of the probability of such a histogram or a worse."""
  total = quantity.integer('total', 0)
  if sum(counts.values()) != total or not set(counts) <= set(shares):
    return compare.failed(quantity.path, 'sizes that we never draw')
  # Pearson's statistic: squared deviation over expectation, summed.
  distance = sum(
    (counts.get(size, 0) - total * share) ** 2 / (total * share)
    for size, share in shares.items()
  )
  # The counts sum to the total, so one of them follows from the others.
  free = max(len(shares) - 1, 1)
  # The upper tail, kept off 0 for the logarithm.
  probability = max(float(special.chdtrc(free, distance)), 1e-300)
  return compare.Row(
    quantity.path,
    float(-np.log10(probability)),
    float(-np.log10(_LEAST_P)),
    f'-log10 p of chi-square {distance:.1f}, {free} degrees of freedom',
  )


_AT = r'(first(?P<first>\d+)|pos_(?P<listed>\d+(_\d+)*))'
_KIND = r'(?P<kind>conv2d[68]?)'

RULES = (
  registry.Rule(
    r'io/chunk_mask_size(?P<size>\d+)_chunk(?P<chunk>-?\d+)_left(?P<left>-?\d+)',
    _chunk_mask,
  ),
  registry.Rule(r'io/subsequent_mask_(?P<size>\d+)', _causal_mask),
  registry.Rule(r'io/pad_mask_lens_(?P<lengths>\d+(_\d+)*)', _pad_mask),
  registry.Rule(
    rf'io/{_KIND}_(?P<form>mask|conv)_len_for_'
    r'T(?P<first>\d+)\.\.(?P<last>\d+)(_minus1_is_error)?',
    _output_lengths,
  ),
  registry.Rule(
    rf'results/{_KIND}/(?P<part>subsampling_rate|right_context)', _subsampling
  ),
  registry.Rule(rf'io/sinusoid_pe_d(?P<width>\d+)_{_AT}', _sinusoids),
  registry.Rule(rf'io/rope_cos_sin_headdim(?P<width>\d+)_{_AT}', _rotations),
  registry.Rule(
    r'results/label_smoothing/smooth(?P<smoothing>[\d.]+)'
    r'_normlen(?P<by_token>True|False)',
    _label_smoothing,
  ),
  registry.Rule('io/moe_y', _moe),
  registry.Rule('results/warmuplr_used', _warmup),
  registry.Rule('results/peaks/frames', None, 'input'),
  registry.Rule(r'results/peaks/(?P<part>collapsed|peaks)', _collapse),
  registry.Rule(
    r'results/peaks/timestamps(_max_token_(?P<longest>\d+(p\d+)?))?', _spans
  ),
  registry.Rule(
    r'results/dynamic_chunk_empirical_(?P<total>\d+)/'
    r'max_len(?P<length>\d+)_max_chunk(?P<largest>\d+)',
    _chunk_draws,
  ),
)
