"""The one table that maps logical axes to mesh axes."""

from collections.abc import Iterable

from u2moe_jax.sharding import axes

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# An axis of size 1 splits nothing, so one table serves every mesh.
STANDARD: Rules = (
  (axes.BATCH, ('data', 'fsdp', 'expert')),
  (axes.LENGTH, None),
  (axes.ACTIVATION_EMBED, None),
  (axes.EMBED, 'fsdp'),
  (axes.HEADS, 'tensor'),
  (axes.KV, None),
  (axes.MLP, 'tensor'),
  (axes.VOCAB, 'tensor'),
  (axes.EXPERT, 'expert'),
  (axes.ROUTER, None),
  (axes.LAYERS, None),
  (axes.CONV, None),
  (axes.CONV_CHANNEL, None),
  (axes.SUBSAMPLING, 'tensor'),
  (axes.FEATURE, None),
)


def mesh_axes(
  rules: Iterable[tuple[str, str | tuple[str, ...] | None]], name: str
) -> tuple[str, ...]:
  """Axes of the mesh that split a logical axis; empty for none."""
  names = dict(rules)[name] or ()
  return (names,) if isinstance(names, str) else tuple(names)
