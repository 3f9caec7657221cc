"""One utterance from inside: CTC posteriors, and the experts of each frame."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from matplotlib import colors
import numpy as np

from experiments.reporting import drawing
from experiments.reporting import expert_load
from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.models import u2

_MOST_ROWS = 40
_MOST_COLUMNS = 600
_FEWEST_ROWS = 6
_VISIBLE = 0.3  # posterior from which a token gets a row


@dataclasses.dataclass(frozen=True)
class Inspection:
  """What the encoder made of one utterance.

  Attributes:
    log_probs: CTC log-probabilities (T, V).
    expert_index: MoE layer name to the first expert chosen, (L, T); empty
      for a dense model.
    expert_blocks: MoE layer name to the numbers of its L blocks.
    text: the best path, read.
    frame_seconds: seconds from one encoder frame to the next.
    tokens: a label for each of the V ids.
    blank_id: id of the blank.
    num_experts: E of the encoder.
  """

  log_probs: np.ndarray
  expert_index: Mapping[str, np.ndarray]
  expert_blocks: Mapping[str, Sequence[int]]
  text: str
  frame_seconds: float
  tokens: tuple[str, ...]
  blank_id: int
  num_experts: int


@struct.dataclass
class _Pass:
  """Arrays of a pass that are worth fetching."""

  log_probs: jax.Array
  mask: jax.Array
  expert_index: dict[str, jax.Array]


# Module and config hash by value: equal ones share a program.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(
  model: u2.U2MoeModel,
  config: config_lib.DecodeConfig,
  params: PyTree,
  buffers: PyTree,
  features: jax.Array,
  lengths: jax.Array,
) -> _Pass:
  variables = {'params': params}
  encoded = model.apply(
    variables,
    features,
    lengths,
    buffers,
    chunk_size=config.chunk_size,
    left_chunks=config.left_chunks,
    method='encode',
  )
  return _Pass(
    log_probs=model.apply(variables, encoded.frames, method='ctc_log_probs'),
    mask=encoded.mask,
    expert_index={
      f'encoder.{name}': stats.expert_index[..., 0]  # [L, B, T]
      for name, stats in encoded.moe.items()
    },
  )


def inspect(
  recognizer: recognizer_lib.Recognizer, samples: np.ndarray
) -> Inspection:
  """Encodes one utterance and keeps what there is to see.

  Args:
    recognizer: model; its decode config gives chunk size and left context.
    samples: mono, at the model's rate, as `recognizer.load` gives them.
  """
  # The recogniser's own padding: a shape it may have met before.
  (batch,) = recognizer.batches([recognizer.features(samples)])
  found = jax.device_get(
    _encode(
      recognizer.model,
      recognizer.config,
      recognizer.params,
      recognizer.buffers,
      jnp.asarray(batch.features),
      jnp.asarray(batch.lengths),
    )
  )
  description = recognizer.description
  # One utterance: row 0, without its padding.
  num_frames = int(found.mask[0].sum())
  log_probs = found.log_probs[0, :num_frames]
  blank_id = description.model.blank_id
  path = best_path(log_probs, blank_id=blank_id)
  shift = description.features.frame_shift_ms / 1000
  return Inspection(
    log_probs=log_probs,
    expert_index={
      name: found.expert_index[name][:, 0, :num_frames]  # [L, T]
      for name in sorted(found.expert_index, key=expert_load.forward_order)
    },
    expert_blocks=description.model.expert_blocks,
    text=recognizer.text([token for token, _ in path]),
    frame_seconds=recognizer.geometry.rate * shift,
    tokens=_labels(recognizer),
    blank_id=blank_id,
    num_experts=description.model.encoder.moe.num_experts,
  )


def _labels(recognizer: recognizer_lib.Recognizer) -> tuple[str, ...]:
  numbers = [f'#{i}' for i in range(recognizer.description.model.vocab_size)]
  if recognizer.tokenizer is None:
    return tuple(numbers)
  tokens = recognizer.tokenizer.tokens
  return tuple(drawing.printable(t, n) for t, n in zip(tokens, numbers))


def best_path(log_probs: np.ndarray, *, blank_id: int) -> list[tuple[int, int]]:
  """Reads the best path as (token, first frame of its run) pairs."""
  ids = log_probs.argmax(axis=-1)
  before = np.concatenate([[blank_id], ids[:-1]])
  frames = np.flatnonzero((ids != blank_id) & (ids != before))
  return [(int(ids[t]), int(t)) for t in frames]


@drawing.styled
def plot_ctc(inspection: Inspection) -> bytes | None:
  """Draws posteriors over time: blank, then tokens as they appear.

  Args:
    inspection: see `inspect`.

  Returns:
    A PNG; None for an utterance without a frame.
  """
  num_frames = len(inspection.log_probs)
  if not num_frames:
    return None
  rows = [inspection.blank_id, *occurring_tokens(inspection)]
  posteriors = np.exp(inspection.log_probs[:, rows].T)  # [rows, T]
  # A token is a frame or two wide: where there are more frames than pixels,
  # peaks over neighbours keep it visible.
  pooled = -(-num_frames // _MOST_COLUMNS)
  starts = np.arange(0, num_frames, pooled)
  figure = drawing.new_figure(1.3 + 0.19 * len(rows))
  axes = figure.subplots()
  column_seconds = pooled * inspection.frame_seconds
  image = axes.imshow(
    np.maximum.reduceat(posteriors, starts, axis=1),
    cmap='Blues',
    vmin=0,
    vmax=1,
    aspect='auto',
    interpolation='nearest',  # a token must not shine into the next row
    extent=(0, len(starts) * column_seconds, len(rows) - 0.5, -0.5),
  )
  axes.set_xlim(0, num_frames * inspection.frame_seconds)
  axes.set_title('CTC posteriors')
  axes.set_xlabel('seconds')
  names = [inspection.tokens[row] for row in rows[1:]]
  _label_rows(axes, ['blank', *names])
  drawing.colour_bar(figure, image, ax=axes, label='probability')
  return drawing.to_png(figure)


def _label_rows(axes: Any, names: list[str]) -> None:
  """Names the rows of an image, and rules between them."""
  axes.set_ylabel('token')
  axes.set_yticks(range(len(names)), names)
  axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
  axes.tick_params(axis='y', which='both', length=0)
  axes.grid(visible=False)
  axes.grid(visible=True, axis='y', which='minor', lw=0.6)


def occurring_tokens(inspection: Inspection) -> list[int]:
  """Finds the tokens worth a row, in the order of their first appearance.

  Those that reach a visible posterior, or else (an untrained model) the few
  that come nearest; never the blank.
  """
  log_probs = inspection.log_probs
  peaks = log_probs.max(axis=0)  # [V]
  # The blank has a row in any case.
  peaks[inspection.blank_id] = -np.inf
  visible = int((peaks > np.log(_VISIBLE)).sum())
  count = min(max(visible, _FEWEST_ROWS), _MOST_ROWS, len(peaks) - 1)
  chosen = np.argsort(-peaks, kind='stable')[:count]
  # A token that never becomes visible appears where it peaks.
  shown = np.minimum(peaks[chosen], np.log(_VISIBLE))
  # argmax of booleans is the first True.
  first = (log_probs[:, chosen] >= shown).argmax(axis=0)
  return [int(chosen[i]) for i in np.argsort(first, kind='stable')]


@drawing.styled
def plot_experts(inspection: Inspection) -> bytes | None:
  """Draws the first expert of every frame and layer as a colour.

  Args:
    inspection: see `inspect`.

  Returns:
    A PNG; None for a dense model or an utterance without a frame.
  """
  if not inspection.expert_index or not len(inspection.log_probs):
    return None
  num_rows = sum(len(each) for each in inspection.expert_index.values())
  num_panels = len(inspection.expert_index)
  figure = drawing.new_figure(1 + 0.24 * num_rows + 0.35 * num_panels)
  panels = figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0]
  palette = drawing.categorical(inspection.num_experts)
  for axes, (name, index) in zip(panels, inspection.expert_index.items()):
    _draw_experts(axes, index, palette, inspection.frame_seconds)
    blocks = inspection.expert_blocks[name]
    axes.set_yticks(range(len(blocks)), [f'{block}' for block in blocks])
    axes.set_title(name)
  panels[-1].set_xlabel('seconds')
  drawing.expert_legend(panels[0], palette)
  return drawing.to_png(figure)


def _draw_experts(
  axes: Any, index: np.ndarray, palette: list[Any], frame_seconds: float
) -> None:
  num_layers, num_frames = index.shape
  axes.imshow(
    index,
    cmap=colors.ListedColormap(palette),
    vmin=-0.5,
    vmax=len(palette) - 0.5,
    aspect='auto',
    interpolation='nearest',  # between two experts there is no third
    extent=(0, num_frames * frame_seconds, num_layers - 0.5, -0.5),
  )
  axes.set_ylabel('block')
  axes.tick_params(axis='y', length=0)
  axes.grid(visible=False)
