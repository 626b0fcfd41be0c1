"""Texts on signs in space and on a user's pictures: what is seen is what the truth says, and there is room for it."""

import itertools
import json
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from configs import rendered_text
from data_pipelines import records
from data_pipelines.text_rendering import compositional, inking, languages, pictures, stored, surfaces, warping
from data_pipelines.text_rendering.colours import contrast
from data_pipelines.text_rendering.settings import Settings
from data_pipelines.text_rendering.source import RenderedText
from data_pipelines.tokenizer import train_tokenizer
from launch import prepare_data

SETTINGS = dict(languages={"en": 1.0, "ru": 1.0, "he": 1.0}, font_folders=("/none",), kinds={"compositional": 1.0}, base_px=160,
                ratios=("1:1", "3:2"))


def save(path, pixels, caption=""):
  Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
  if caption:
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
  """A picture that is even in its left half alone, one that is not, and one that is broken."""
  rng = np.random.default_rng(0)
  own = tmp_path / "own"
  own.mkdir()
  half = np.full((192, 192, 3), 210) + np.arange(192)[None, :, None] // 8
  half[:, 120:] = rng.integers(0, 255, (192, 72, 3))
  save(own / "half.png", half, "A pale wall beside a hedge")
  save(own / "hedge.png", rng.integers(0, 255, (192, 192, 3)))
  (own / "broken.jpg").write_bytes(b"no picture")
  return own


# ---- planes in space ----------------------------------------------------------------------------------


@pytest.mark.parametrize("turns, angle, bow", [((0, 0, 0), 0.0, 0.0), ((25, 0, 5), 0.0, 0.0), ((-20, 12, -4), 0.0, 0.0), ((10, 5, 2), 1.2, 0.1)])
def test_what_is_read_lies_where_points_are_projected(turns, angle, bow):
  warp = warping.place((20, 30, 220, 150), 1.6, turns, angle, bow)
  hull = warp.hull((0, 0, warp.width, warp.height))
  assert hull[0] >= 19.9 and hull[1] >= 29.9 and hull[2] <= 220.1 and hull[3] <= 150.1
  assert max((hull[2] - hull[0]) / 200, (hull[3] - hull[1]) / 120) == pytest.approx(1, abs=0.01)
  for u, v in itertools.product((0.2, 0.5, 0.8), repeat=2):
    plane = np.zeros((warp.height, warp.width), np.uint8)
    cv2.circle(plane, (int(u * warp.width), int(v * warp.height)), 6, 255, -1)
    rows, columns = np.nonzero(warp.read(plane, (0, 0, 240, 180)) > 127)
    x, y = warp.to_picture(np.array([u * warp.width, v * warp.height]))
    assert abs(columns.mean() + 0.5 - x) < 1 and abs(rows.mean() + 0.5 - y) < 1


def test_the_scale_is_that_of_the_furthest_part():
  flat = warping.place((0, 0, 200, 100), 2.0, (0, 0, 0))
  assert flat.scale((0, 0, flat.width, flat.height)) == pytest.approx(1 / warping.FINE, rel=0.02)
  turned = warping.place((0, 0, 200, 100), 2.0, (30, 0, 0))
  left, right = (turned.scale((x, 0, x + 10, turned.height)) for x in (0, turned.width - 10))
  assert turned.scale((0, 0, turned.width, turned.height)) == pytest.approx(min(left, right), rel=0.05) and abs(left - right) > 0.05
  assert turned.angle_of((0, 0, turned.width, turned.height)) == pytest.approx(0, abs=0.1)


# ---- even parts ---------------------------------------------------------------------------------------


def test_even_parts_are_found_and_uneven_ones_are_not():
  rng = np.random.default_rng(0)
  gray = rng.integers(0, 255, (200, 300)).astype(np.uint8)
  gray[40:140, 60:220] = (np.arange(100)[:, None] + np.arange(160) // 2 + rng.integers(-4, 5, (100, 160))).clip(0, 255)  # a noisy slope
  for seed in range(8):
    found = pictures.find_regions(np.random.default_rng(seed), gray, 60, 30, 2)
    assert found and all(left >= 54 and top >= 34 and right <= 226 and bottom <= 146 for left, top, right, bottom in found)
    assert all(right - left >= 58 and bottom - top >= 28 for left, top, right, bottom in found)
    assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for a, b in itertools.combinations(found, 2))
  assert not pictures.find_regions(np.random.default_rng(0), gray, 200, 30, 2)


def test_a_picture_without_room_is_passed_over_and_a_caption_is_kept(folder):
  source = RenderedText(Settings(**SETTINGS, pictures=str(folder)), "train", 64)
  skipped = 0
  for number in range(6):
    record = source.record(number)
    truth = source.truth(record)
    skipped += truth["ground"]["skipped"]
    assert truth["ground"]["file"] == "half.png"
    assert all(text.startswith("A pale wall beside a hedge. ") for text in record["captions"][:2])
    assert all(block["box"][2] <= 0.65 * record["width"] for block in truth["blocks"])
    height, width = record["image"].shape[:2]
    plain = pictures.Pictures.open(str(folder)).load(sorted(("half.png", "hedge.png", "broken.jpg")).index("half.png"), height, width)
    assert (record["image"][:, -width // 3:] == plain[:, -width // 3:]).all()  # the hedge is as it was
  assert skipped > 0


def test_another_folder_is_other_data(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(stored, "NUM_SLOTS", {"train": 32, "validation": 4})
  monkeypatch.setattr(stored, "_TRAINED_ON", 12)
  cfg = rendered_text.get_config()
  cfg.update({key: value for key, value in SETTINGS.items() if key not in ("languages", "kinds")})
  cfg.languages, cfg.kinds, cfg.pictures = {"en": 1.0}, {"compositional": 1.0}, str(folder)
  facts = prepare_data.prepare_rendered(str(tmp_path), cfg, "signs", vocab_size=600)
  assert [facts[f"pictures{name}"] for name in ("", "_broken", "_without_room")] == [3, 1, 1]
  assert records.open_split(tmp_path, "signs", "train")[0][5]["image"]
  pictures.Pictures.open.cache_clear()
  (folder / "half.txt").write_text("Another caption")
  with pytest.raises(ValueError, match="prepared with other pictures than"):
    records.open_split(tmp_path, "signs", "train")
  (folder / "half.png").unlink()
  pictures.Pictures.open.cache_clear()
  with pytest.raises(ValueError, match=r"Of 2 pictures 1 have no even part of \d+x\d+ px and 1 are broken, such as broken.jpg"):
    stored.survey_pictures(Settings(**SETTINGS, pictures=str(folder)))
  pictures.Pictures.open.cache_clear()


def test_a_data_set_that_was_prepared_is_a_folder_of_pictures(tmp_path):
  plain = Settings(languages={"en": 1.0}, font_folders=("/none",), base_px=128, layouts={"single": 1.0})
  stored.prepare(plain, tmp_path, "texts", num_examples=3, vocab_size=600)
  found = pictures.Pictures(str(tmp_path / "texts"))
  assert len(found) == 3 and found.load(1, 96, 128).shape == (96, 128, 3)
  assert found.captions(2) == {"en": RenderedText(plain, "train", 3).record(2)["captions"][0]} and len(found.digest) == 16


@pytest.mark.parametrize("wrong, sentence", [(dict(pictures="/none"), "is for the compositional kind: add it to kinds"),
                                             (dict(pictures="/none", kinds={"compositional": 1.0}), "pictures=/none is no folder")])
def test_pictures_that_cannot_be_used_are_one_sentence(wrong, sentence):
  with pytest.raises(ValueError, match=sentence):
    RenderedText(Settings(languages={"en": 1.0}, font_folders=("/none",), **wrong), "train", 4).record(0)


# ---- what is drawn ------------------------------------------------------------------------------------


def test_a_picture_is_a_function_of_its_number():
  source = RenderedText(Settings(**SETTINGS), "train", 64)
  other = pickle.loads(pickle.dumps(source))
  numbers = [5, 10**9, 5 + 64]
  assert [other[number] for number in numbers[::-1]] == [source[number] for number in numbers][::-1]
  assert len({source[number]["image"] for number in numbers}) == 3


def test_what_is_seen_is_what_the_truth_says(monkeypatch):
  """Without texts the same picture differs within their boxes alone, and letters stand out from what is behind them."""
  source, pasted = RenderedText(Settings(**SETTINGS), "train", 64), []
  lay = inking._lay
  monkeypatch.setattr(inking, "_lay", lambda picture, box, *rest: pasted.append((box, picture.copy())) or lay(picture, box, *rest))
  monkeypatch.setattr(compositional, "add_grain", lambda *_: None)
  for number in range(24):
    pasted.clear()
    record = source.record(number)
    truth, image = source.truth(record), record["image"]
    height, width = image.shape[:2]
    assert truth["texts"] == [block["text"] for block in truth["blocks"]]
    for block in truth["blocks"]:
      quad, (left, top, right, bottom) = np.array(block["quad"]), block["box"]
      assert block["contrast"] >= 4.5 and block["size_px"] >= 0.97 * 10
      assert (quad >= -0.1).all() and (quad <= (width + 0.1, height + 0.1)).all()
      assert quad[:, 0].min() >= left - 0.1 and quad[:, 1].max() <= bottom + 0.1 and 0 <= left < right <= width and 0 <= top < bottom <= height
      assert f'"{block["text"]}"' in record["captions"][1] and block["text"] in record["captions"][2]
      assert "".join("".join(line["text"] for line in block["lines"]).split()) == "".join(block["text"].split())
      before = next(pixels for box, pixels in pasted[::-1] if box[0] <= left and box[1] <= top and box[2] >= right and box[3] >= bottom)
      changed = np.abs(image.astype(int) - before).sum(2)[top:bottom, left:right]
      seen = changed > 0.9 * changed.max()
      ink, behind = (np.median(pixels[top:bottom, left:right][seen], 0) for pixels in (image, before))
      assert contrast(ink, behind) >= 3.5  # strokes thinner than a pixel are nowhere wholly inked
      for line in block["lines"]:
        box = line["box"]
        assert (np.abs(image.astype(int) - before).sum(2)[box[1]:box[3], box[0]:box[2]] > 40).any()


def test_every_object_has_a_name_in_every_language():
  names = {*surfaces.SURFACES, "wall", "picture"}
  for code in languages.codes():
    assert set(languages.load(code).objects) == names and all(languages.load(code).objects.values())


@pytest.mark.parametrize("name", surfaces.SURFACES)
def test_letters_may_stand_where_a_face_is_even(name):
  surface = surfaces.SURFACES[name]
  for seed in range(3):
    face = surfaces.draw_face(np.random.default_rng(seed), surface, 120, round(120 * np.mean(surface.ratios)))
    left, top, right, bottom = map(round, face.frame)
    inside = face.pixels[top:bottom, left:right]
    assert (inside[..., 3] == 255).all() and inside.shape[0] > 40 and inside.shape[1] > 40
    assert cv2.cvtColor(inside[..., :3], cv2.COLOR_RGB2GRAY).std() < 26


def test_the_truth_names_the_objects_that_are_drawn(monkeypatch):
  drawn, draw = [], surfaces.draw_face
  names = {id(surface): name for name, surface in surfaces.SURFACES.items()}
  monkeypatch.setattr(surfaces, "draw_face", lambda rng, surface, *sides: drawn.append(names[id(surface)]) or draw(rng, surface, *sides))
  source, found = RenderedText(Settings(**SETTINGS), "train", 64), set()
  for number in range(16):
    drawn.clear()
    said = {block["object"] for block in json.loads(source.record(number)["attributes"])["blocks"]} - {"wall", "picture"}
    assert said <= set(drawn)
    found |= said
  assert len(found) > 4


def test_captions_say_what_is_there():
  source = RenderedText(Settings(**SETTINGS), "train", 64)
  for number in range(12):
    record = source.record(number)
    truth = json.loads(record["attributes"])
    for block in truth["blocks"]:
      if block["object"] in ("wooden sign", "metal sign", "shop sign", "chalkboard", "poster", "screen"):
        assert all(block["object"] in text for text in record["captions"][:2])
      assert languages.load(truth["language"]).objects[block["object"]] in record["captions"][2]


def test_a_caption_that_is_too_long_keeps_its_beginning(folder):
  (folder / "half.txt").write_text("A pale wall. " + "It goes on and on beside the hedge. " * 40)
  pictures.Pictures.open.cache_clear()
  settings = Settings(**SETTINGS, pictures=str(folder))
  plain = RenderedText(settings, "train", 64)
  tokenizer = train_tokenizer([text for number in range(6) for text in plain.record(number)["captions"]], 900)
  for number in range(3):
    record = RenderedText(settings, "train", 64, tokenizer).record(number)
    assert record["captions"][1].startswith("A pale wall. It goes on") and len(record["captions"][1]) < 700
    assert len(plain.record(number)["captions"][1]) > 1000
  pictures.Pictures.open.cache_clear()
