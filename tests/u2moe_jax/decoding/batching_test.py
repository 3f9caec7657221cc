"""Which utterances are decoded together, in which shapes."""

from u2moe_jax.decoding import batching


def _shapes(lengths, *, max_frames=12_000):
  plan = list(
    batching.plan(lengths, max_frames=max_frames, smallest=7, parts=1)
  )
  assert sorted(i for indices, _, _ in plan for i in indices) == list(
    range(len(lengths))
  )
  for indices, frames, rows in plan:
    assert len(indices) <= rows
    assert all(lengths[i] <= frames for i in indices)
  return {(frames, rows) for _, frames, rows in plan}


def test_few_utterances_take_a_longer_shape_instead_of_one_of_their_own():
  common = [250] * 200
  assert _shapes(common) == {(274, 43)}
  assert _shapes([130, *common, 260]) == {(274, 43)}


def test_what_would_fill_a_batch_keeps_its_shape():
  # 60 of 100 frames are half a batch, but not among the longest.
  shapes = _shapes([100] * 60 + [6000] * 4)
  assert {frames for frames, _ in shapes} == {100, 7904}


def test_one_utterance_has_no_empty_rows():
  assert _shapes([130]) == {(140, 1)}
