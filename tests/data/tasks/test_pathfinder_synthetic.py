"""Pictures drawn here: labels, paths, law, and the task made of them."""

import numpy as np
import pytest
from PIL import Image

from spectraformer_jax import data
from spectraformer_jax.data import __main__ as command
from spectraformer_jax.data.generators import pathfinder as generator
from spectraformer_jax.data.generators.pathfinder import Pictures, sample
from spectraformer_jax.data.generators.pathfinder_shapes import (
  SETTINGS,
  make_shapes,
)
from tests.data import flood

# side, bars, seeding, count
KINDS = [
  (32, 14, "upstream", 250),
  (32, 14, "any", 250),
  (32, 6, "upstream", 250),
  (64, 14, "any", 60),
  (128, 14, "upstream", 30),
]


def draw(count, seed, side, bars, seeding):
  """The first `count` pictures."""
  batches, rng = [], np.random.default_rng(seed)
  stream = sample(rng, SETTINGS[side], bars=bars, seeding=seeding)
  while sum(len(batch.labels) for batch in batches) < count:
    batches.append(next(stream))
  joined = map(np.concatenate, zip(*batches, strict=True))
  return Pictures(*(array[:count] for array in joined))


@pytest.fixture(scope="module")
def drawn():
  """Pictures of a kind, drawn once."""
  known = {}

  def get(kind):
    if kind not in known:
      known[kind] = draw(kind[3], 0, *kind[:3])
    return known[kind]

  return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_every(3)
def test_labels_say_whether_a_path_joins_the_discs(drawn, kind):
  pictures = drawn(kind)
  joined, touching = flood.check(pictures, kind[0])
  # No snake runs into another one, short ones included.
  assert not touching.any()
  assert joined.tolist() == (pictures.labels == 1).tolist()
  assert 0 < joined.sum() < len(joined)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_every(3)
def test_discs_are_at_a_start_and_an_end(drawn, kind):
  pictures = drawn(kind)
  for snakes, discs in zip(pictures.snakes, pictures.discs, strict=True):
    starts, ends = snakes[:2, 0, :2], snakes[:2, -1, 2:]
    for places, disc in ((starts, discs[0]), (ends, discs[1])):
      assert np.linalg.norm(places - disc, axis=1).min() < 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_bars_follow_the_rules(drawn, kind):
  side, bars, seeding, _ = kind
  settings, snakes = SETTINGS[side], drawn(kind).snakes
  assert snakes.shape[1:] == (
    2 + settings.distractor_bars // (bars // 3),
    bars,
    4,
  )
  lengths = np.isfinite(snakes[..., 0]).sum(axis=2)
  assert set(lengths[:, :2].ravel().tolist()) == {bars}
  assert set(lengths[:, 2:].ravel().tolist()) <= {0, bars // 3}
  along = snakes[..., 2:] - snakes[..., :2]
  size = np.linalg.norm(along, axis=-1)
  # float32, at coordinates up to 128.
  np.testing.assert_allclose(
    size[np.isfinite(size)], settings.bar_length, atol=1e-4
  )
  gap = np.linalg.norm(snakes[:, :, 1:, :2] - snakes[:, :, :-1, 2:], axis=-1)
  gap = gap[np.isfinite(gap)]
  # Ends and pivots are pixels: each rounding moves them by 0.71 at most.
  assert gap.min() > 2 * min(settings.margins) - 1.42
  assert gap.max() < 2 * max(settings.margins) + 1.42
  cosine = (along[:, :, 1:] * along[:, :, :-1]).sum(axis=-1)
  cosine = cosine[np.isfinite(cosine)] / settings.bar_length**2
  assert cosine.min() > np.cos(np.pi / 2 / settings.continuity) - 1e-3
  starts = snakes[:, 0, 0, :2] - snakes[:, 1, 0, :2]
  # Three roundings, of each start and of the distance.
  distance = np.linalg.norm(starts, axis=1) - settings.seed_distance
  assert np.abs(distance).max() < 3 * 0.71
  inside = snakes[np.isfinite(snakes)]
  assert inside.min() > 0 and inside.max() < side - 1


@pytest.mark.parametrize("kind", KINDS)
def test_seeding_decides_where_snakes_set_out(drawn, kind):
  snakes = drawn(kind).snakes
  along = snakes[:, :, 0, 2:] - snakes[:, :, 0, :2]
  degrees = np.rad2deg(np.arctan2(along[..., 0], along[..., 1])) % 360
  first, second, short = degrees[:, 0], degrees[:, 1], degrees[:, 2:]
  short = short[np.isfinite(short)]
  if kind[2] == "upstream":
    for some in (first, short):
      assert (np.abs(some - 225) < 15.5).all()
  else:
    assert set((first // 90).tolist()) == set((short // 90).tolist())
    assert set((first // 90).tolist()) == {0, 1, 2, 3}
  assert set((second // 90).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_show_the_bars_and_discs_and_nothing_else(drawn, kind):
  side, settings, pictures = kind[0], SETTINGS[kind[0]], drawn(kind)
  assert (pictures.pixels.max(axis=1) == 255).all()
  grid = np.stack(np.mgrid[:side, :side], axis=-1).reshape(-1, 2)
  for index in range(10 if side == 32 else 2):
    pixels = pictures.pixels[index].reshape(side, side)
    bars = np.concatenate([flood.present(s) for s in pictures.snakes[index]])
    middle = np.rint((bars[:, :2] + bars[:, 2:]) / 2).astype(int)
    assert (pixels[tuple(middle.T)] > 25).all()
    far = np.ones(side * side, bool)
    for bar in bars:
      points = bar[:2] + (bar[2:] - bar[:2]) * np.linspace(0, 1, 20)[:, None]
      distance = np.linalg.norm(grid[:, None] - points, axis=-1).min(axis=1)
      far &= distance > settings.thickness / 2 + 0.75
    for disc in pictures.discs[index]:
      distance = np.linalg.norm(grid - disc, axis=1)
      far &= distance > settings.radius + 0.75
      whole = pixels.ravel()[distance < settings.radius - 0.75]
      # A bar of a short snake may be twice as bright.
      assert whole.min() >= 120
    assert far.mean() > 0.5 and not pixels.ravel()[far].any()


def test_label_shares_and_stream():
  first, again = (draw(400, 5, 32, 6, "upstream") for _ in range(2))
  for one, two in zip(first, again, strict=True):
    np.testing.assert_array_equal(one, two)
  other = draw(400, 6, 32, 6, "upstream")
  assert (first.pixels != other.pixels).any(axis=1).all()
  labels = np.concatenate([first.labels, other.labels])
  # Four standard errors of 800 fair coins.
  assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(800)


def test_margins_are_equally_frequent():
  # They differ in how often they succeed.
  snakes = draw(100, 1, 128, 6, "any").snakes
  gap = np.linalg.norm(snakes[:, 0, 1:, :2] - snakes[:, 0, :-1, 2:], axis=-1)
  narrow = (gap.mean(axis=1) < 5).sum()
  # Four standard deviations of 100 fair coins.
  assert 30 <= narrow <= 70


def test_a_short_snake_that_fails_leaves_no_trace():
  shapes = make_shapes(SETTINGS[32], 1)
  rng = np.random.default_rng(0)
  grid = generator._Grid(rng, shapes, 200)
  pages = np.arange(0, 200, 2)
  directions = len(shapes.ends) + rng.integers(0, 360, len(pages))
  before = grid.occupied.copy(), grid.near.copy()
  # So long that many run out of room, and few do at once.
  grown, bars = generator._grow_one(grid, pages, directions, 20)
  assert 10 < len(grown) < 90 and bars.shape == (len(grown), 20, 2)
  for pixels, old in zip((grid.occupied, grid.near), before, strict=True):
    changed = (pixels != old).any(axis=1)
    assert np.flatnonzero(changed).tolist() == pages[grown].tolist()


@pytest.fixture
def load(tmp_path):
  sizes = dict(num_train=120, num_dev=20, num_test=30, bars=6)
  return lambda split="train", **options: data.load(
    "pathfinder_synthetic",
    split,
    cache_dir=tmp_path / "cache",
    **sizes | options,
  )


def test_the_task(load):
  seen = []
  splits = {
    split: load(split, progress=lambda done, total: seen.append((done, total)))
    for split in data.SPLITS
  }
  assert [len(dataset) for dataset in splits.values()] == [120, 20, 30]
  assert seen[-1] == (170, 170) and seen == sorted(seen)
  train = splits["train"]
  assert train.name == (
    "pathfinder_synthetic-bars6-num_train120-num_dev20-num_test30"
  )
  assert (train.provenance, train.tokenizer) == ("generated", "pixels")
  assert (train.length, train.vocab_size, train.num_classes) == (1024, 256, 2)
  pictures = [e["tokens"].tobytes() for d in splits.values() for e in d]
  assert len(set(pictures)) == 170
  expected = draw(120, [0, 0], 32, 6, "upstream")
  assert train.labels.tolist() == expected.labels.tolist()
  assert (train.tokens.reshape(-1, 1024) == expected.pixels).all()


def test_seed_and_options_decide_the_content(load):
  fingerprints = [
    load("dev", **options).fingerprint
    for options in (
      {},
      dict(seed=1),
      dict(seeding="any"),
      dict(bars=9),
      dict(side=64),
    )
  ]
  assert len(set(fingerprints)) == 5
  assert load("dev", side=64).length == 4096


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(side=48), "side must be one of 32, 64, 128, got 48"),
    (dict(bars=7), "bars must be one of 6, 9, 14, got 7"),
    (
      dict(seeding="all"),
      "seeding must be one of 'upstream', 'any', ",
    ),
    (dict(num_dev=0), "num_dev must be an integer >= 1, got 0"),
  ],
)
def test_bad_options(load, options, message):
  with pytest.raises(ValueError, match=message) as caught:
    load(**options)
  assert "\n" not in str(caught.value)


def test_check_draws_them(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  sizes = [f"--num_{name}=60" for name in ("train", "dev", "test")]
  args = ["check", "pathfinder_synthetic", "--bars=6", "--cache_dir=c", *sizes]
  assert command.main([*args, "--pictures=p.png"]) == 0
  assert "generated, tokenizer pixels" in capsys.readouterr().out
  with Image.open("p.png") as sheet:
    assert sheet.size == (8 * 68, 2 * 68)
