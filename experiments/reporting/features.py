"""An utterance from sound to what training sees of it, as one picture."""

import textwrap

from matplotlib import ticker

from experiments.reporting import drawing
from experiments.wiring import inspection
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import fbank

_TITLE_WIDTH = 110  # characters on a line of the page's width


@drawing.styled
def plot(example: inspection.Example, config: config_lib.DataConfig) -> bytes:
  """Draws waveform, plain and augmented features below each other.

  Args:
    example: the utterance.
    config: how its features were made and augmented.

  Returns:
    A PNG file. Both spectrograms have one time axis and one colour scale.
  """
  import librosa.display as display  # seconds to import, for pictures alone

  features = config.features
  figure = drawing.new_figure(7.2)
  panels = figure.subplots(3, 1, sharex=True, height_ratios=(2, 3, 3))
  rate = features.sample_rate
  display.waveshow(
    example.samples,
    sr=rate,
    axis='s',
    ax=panels[0],
    color=drawing.PALETTE[0],
    linewidth=0.5,
  )
  panels[0].set(title=_title(example, rate), xlabel='', ylabel='amplitude')
  low, high = _range(example)
  for axes, frames, title in (
    (panels[1], example.frames, 'log-mel features'),
    (panels[2], example.augmented, _augmented_title(example, config.augment)),
  ):
    image = display.specshow(
      frames.T,  # [F, T]
      sr=rate,
      hop_length=features.shift_samples,
      x_axis='s',
      y_axis='mel',
      # The bins are Kaldi's, and librosa would place its own.
      y_coords=fbank.centre_frequencies(features),
      fmax=rate / 2,
      ax=axes,
      cmap='magma',
      vmin=low,
      vmax=high,
    )
    axes.grid(False)
    axes.set(title=title, xlabel='', ylabel='Hz')
  longest = max(len(example.frames), len(example.augmented))
  panels[2].set_xlim(0, longest * features.frame_shift_ms / 1000)
  panels[2].xaxis.set_major_locator(ticker.MaxNLocator(10, steps=[1, 2, 5, 10]))
  panels[2].set_xlabel('seconds')
  drawing.colour_bar(
    figure, image, ax=list(panels[1:]), label='natural log of the energy'
  )
  return drawing.to_png(figure)


def _range(example: inspection.Example) -> tuple[float, float]:
  """Colours by the plain features; digital silence would take all of them."""
  values = example.frames[example.frames > 0.0]
  low = float(values.min()) if values.size else 0.0
  return low, max(float(example.frames.max()), low + 1.0)


def _title(example: inspection.Example, rate: int) -> str:
  seconds = len(example.samples) / rate
  text = drawing.printable(example.text, '(text not in the font)')
  words = textwrap.shorten(text, _TITLE_WIDTH, placeholder=' …')
  about = f'{example.key}: {seconds:.2f} s, {len(example.tokens)} tokens'
  return f'{about}\n{words}'


def _augmented_title(
  example: inspection.Example, config: config_lib.AugmentConfig
) -> str:
  """Names what may have happened; for some of it, chance decided."""
  kinds = {
    'reverberation': config.reverb_probability,
    'noise': config.noise_probability,
    'volume': config.volume_probability,
    'SpecAugment': config.num_time_masks + config.num_freq_masks,
    'SpecSub': config.num_substitutions,
    'SpecTrim': config.max_trim,
  }
  names = ', '.join(name for name, used in kinds.items() if used)
  about = f'the same in batch {example.batch}: speed {example.speed:g}'
  return f'{about}; {names}' if names else about
