"""The joint sequence: order, positions and blocks, whatever the padding."""

import jax
import numpy as np
import pytest

from qimg2.layout import centred_grid, make_layout
from qimg2.models import mmdit

SLOT, PAD = 9, 0
compiled = jax.jit(make_layout, static_argnums=(2, 3, 4))


def layout(rows, grids, target, length=None):
  """The layout of prompts given as lists of ids, padded to `length`."""
  length = length or max(map(len, rows))
  tokens = np.full((len(rows), length), PAD, np.int32)
  for row, ids in zip(tokens, rows):
    row[:len(ids)] = ids
  return compiled(tokens, np.array([len(ids) for ids in rows]), SLOT, tuple(grids), target)


def test_published_check_vector():
  # 3 text tokens, a 2 x 4 image (2 slots), 2 text tokens, then a 4 x 4 target.
  found = layout([[1, 2, 3, SLOT, SLOT, 4, 5]], [(2, 4)], (4, 4))
  frame, h, w = np.moveaxis(np.asarray(found.positions[0]), -1, 0)
  np.testing.assert_array_equal(frame, [0, 1, 2, *[3] * 8, 7, 8, *[9] * 16])
  np.testing.assert_array_equal(h[3:11], [-1] * 4 + [0] * 4)
  np.testing.assert_array_equal(w[3:11], [-2, -1, 0, 1] * 2)
  np.testing.assert_array_equal(h[13:], np.repeat([-2, -1, 0, 1], 4))
  np.testing.assert_array_equal(w[13:], [-2, -1, 0, 1] * 4)
  for axis in (h, w):
    np.testing.assert_array_equal(axis[[0, 1, 2, 11, 12]], [0, 1, 2, 7, 8])
  # 7 prompt tokens, then 8 latents: places of the image take latents in raster order.
  np.testing.assert_array_equal(found.index[0], [0, 1, 2, *range(7, 15), 5, 6])
  np.testing.assert_array_equal(found.block[0], [0, 0, 0, *[1] * 8, 0, 0, *[2] * 16])
  assert bool(found.valid.all())


def test_odd_grids_are_centred_as_published():
  h, w = centred_grid((3, 5))
  np.testing.assert_array_equal(h[::5], [-2, -1, 0])
  np.testing.assert_array_equal(w[:5], [-3, -2, -1, 0, 1])


@pytest.mark.parametrize("grids, slots", [([], []), ([(2, 4)], [2]), ([(4, 2), (2, 2)], [2, 1])])
def test_padding_moves_nothing(grids, slots):
  groups = [[SLOT] * n for n in slots]
  ids = [1, *sum(groups, []), 2, 3]
  alone, padded = layout([ids], grids, (2, 2)), layout([ids, [*ids, 4, 5]], grids, (2, 2), length=len(ids) + 4)
  num = alone.valid.shape[1] - 4
  np.testing.assert_array_equal(padded.valid[0, :-4], np.arange(num + 4) < num)
  for name in ("positions", "block"):
    mine, theirs = np.asarray(getattr(alone, name)[0]), np.asarray(getattr(padded, name)[0])
    np.testing.assert_array_equal(np.concatenate([theirs[:num], theirs[-4:]]), mine)
  # A longer prompt moves the target on by its two tokens more.
  assert (padded.positions[1, -1, 0] - padded.positions[0, -1, 0]) == 2


def test_adjacent_images_stay_separate_blocks():
  found = layout([[1, SLOT, SLOT, 2]], [(2, 2), (2, 2)], (2, 2))
  np.testing.assert_array_equal(found.block[0], [0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 3, 3, 3, 3])
  mask = np.asarray(mmdit.attention_mask(mmdit.Config(), found)[0])
  assert mask[1, 4] and not mask[1, 5] and mask[5, 1] and mask[5, 8] and not mask[0, 1] and mask[10].all()
  full = mmdit.attention_mask(mmdit.Config(attention="full"), found)
  assert np.broadcast_to(full[0], (14, 14)).all()


def test_an_image_that_fills_no_slot_is_named():
  with pytest.raises(ValueError, match="3 x 2 latents does not fill whole prompt slots"):
    layout([[1, SLOT]], [(3, 2)], (2, 2))
