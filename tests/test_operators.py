"""Every operator on both sides of its threshold, the words it drops with, and the list that a config spells out."""

import dataclasses
import io
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from configs import curation
from data_pipelines.curation import measures, ocr
from data_pipelines.curation.operators import OPERATORS, make_operators, missing_report_operators
from data_pipelines.curation.sample import Caption, Sample
from data_pipelines.embedded.drawing import _font_path
from data_pipelines.tokenizer import train_tokenizer


def photo(seed=0, side=512):
  """Smooth noise of all scales, a ramp of light, and things with sharp edges and grain."""
  rng = np.random.default_rng(seed)
  pixels = np.linspace(60, 170, side)[:, None, None] + np.zeros((side, side, 3))
  for octave in range(1, 8):
    coarse = rng.normal(0, 60 / octave, (2 ** octave, 2 ** octave, 3)).astype(np.float32)
    pixels += cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC) / 2
  image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
  draw = ImageDraw.Draw(image)
  for _ in range(12):
    x, y, size = rng.integers(0, side, 3)
    draw.ellipse((x, y, x + size / 4, y + size / 3), fill=tuple(rng.integers(30, 220, 3).tolist()))
  return image


def slide(size_px=40, lines=6, side=1024, paper="white", ink="black"):
  image = Image.new("RGB", (side, side), paper)
  font = ImageFont.truetype(_font_path("DejaVuSans.ttf"), size_px)
  for line in range(lines):
    ImageDraw.Draw(image).text((60, 60 + line * (side - 100) / lines), f"Report of quarter {line}", font=font, fill=ink)
  return image


def drawing():
  image = Image.new("RGB", (64, 64), "white")
  ImageDraw.Draw(image).ellipse((12, 12, 50, 50), fill=(200, 40, 30))
  return image


def flat(value=128, side=300):
  return Image.new("RGB", (side, side), value if isinstance(value, tuple) else (value,) * 3)


def noise(sigma=None, side=300):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (side, side, 3)) if sigma is None else np.array(photo(side=side)) + rng.normal(0, sigma, (side, side, 3))
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image, kind="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def as_sample(image, *texts, kind="PNG", **options):
  data = image if isinstance(image, bytes) else encode(image, kind, **options)
  return Sample("set/1", data, [Caption(text) for text in texts or ("a picture",)])


def pack(*fields):
  """Bytes of a protocol buffer message from (number, value) pairs; numbers up to 16383."""
  number_bytes = lambda one: bytes([one] if one < 128 else [one % 128 | 128, one // 128])
  texts = [(number, value.encode() if isinstance(value, str) else value) for number, value in fields]
  return b"".join(number_bytes(number << 3) + number_bytes(value) if isinstance(value, int) else
                  number_bytes(number << 3 | 2) + number_bytes(len(value)) + value for number, value in texts)


def onnx_model(*nodes, ids=False):
  """An ONNX file of nodes (kind, inputs, output, attributes) that computes "score" from float "pixels" and, if asked, integer "ids"."""
  def tensor(name, kind):
    return pack((1, name), (2, pack((1, pack((1, kind))))))

  def attribute(name, value):  # ints, or one int
    return pack((1, name), *((8, one) for one in value), (20, 7)) if isinstance(value, tuple) else pack((1, name), (3, value), (20, 2))

  graph = [(1, pack(*((1, one) for one in inputs), (2, output), (4, kind), *((5, attribute(*one)) for one in attributes.items())))
           for kind, inputs, output, attributes in nodes]
  inputs = [tensor("pixels", 1)] + [tensor("ids", 7)] * ids
  graph += [(2, "graph"), *((11, one) for one in inputs), (12, tensor("score", 1))]
  return pack((1, 7), (8, pack((1, ""), (2, 13))), (7, pack(*graph)))


MEAN = ("ReduceMean", ["pixels"], "score", dict(keepdims=0))
MEAN_AND_NUMBER_OF_IDS = (("ReduceMean", ["pixels"], "mean", dict(keepdims=0)), ("Shape", ["ids"], "shape", {}),
                          ("Cast", ["shape"], "floats", dict(to=1)), ("ReduceSum", ["floats"], "sum", dict(keepdims=0)),
                          ("Add", ["mean", "sum"], "score", {}))  # the shape is (1, n), so that the sum is n + 1


def apply(name, sample, stage="S1", tokenizer=None, **settings):
  step, = make_operators([dict(name=name, stage=stage, **settings)], tokenizer)
  return step.apply(sample)


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer(["a cat on a mat", "a dog in the fog"] * 3, 400)


def test_broken_names_the_error():
  drop = apply("broken", as_sample(encode(photo())[:5000]))
  assert drop.reason == "undecodable" and "Cannot decode set/1 (5000 bytes)" in drop.detail
  edit = Sample("set/2", encode(photo()), [Caption("make it red")], [encode(photo()), b"no picture"])
  assert "condition image 2 of set/2" in apply("broken", edit).detail
  assert apply("broken", Sample("set/3", error="The file a.jpg is missing.")).detail == "The file a.jpg is missing."
  animation = as_sample(flat(10), save_all=True, append_images=[flat(200)])
  assert apply("broken", animation) is None and animation.pixels.max() == 10


@pytest.mark.parametrize("size, settings, reason", [
    ((256, 256), {}, None), ((512, 128), {}, None), ((257, 255), {}, "too_small"), ((100, 100), dict(min_px=100), None),
    ((512, 128), dict(min_side_px=129), "too_small"), ((512, 128), dict(max_aspect=4), None), ((512, 128), dict(max_aspect=3.9), "too_long")])
def test_min_resolution_counts_area_sides_and_aspect(size, settings, reason):
  drop = apply("min_resolution", as_sample(flat().resize(size)), **settings)
  assert (drop and drop.reason) == reason
  assert not drop or f"{size[0]} x {size[1]} px" in drop.detail


def test_rotation_tags_turned_pictures_and_drops_invalid_ones():
  def rotated(orientation, kind="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return as_sample(photo(side=64), kind=kind, exif=exif)
  for orientation, tagged, kind in ((0, False, "JPEG"), (1, False, "JPEG"), (6, True, "PNG"), (8, True, "WEBP")):
    sample = rotated(orientation, kind)
    assert apply("rotation", sample) is None and (sample.tags == {"exif_orientation": orientation}) == tagged
  assert apply("rotation", as_sample(photo())) is None
  assert apply("rotation", rotated(9)).reason == "bad_orientation"
  assert apply("rotation", rotated(1), drop_rotated=True) is None
  assert "is 6, not 1" in apply("rotation", rotated(6), drop_rotated=True).detail


# Pictures that each operator must keep or drop at its defaults.
KEEP = {
    "entropy": [photo(), slide(lines=1), slide(24, lines=30), drawing(), noise(20)],
    "blur": [photo(), slide(lines=1), drawing(), photo().filter(ImageFilter.GaussianBlur(1))],
    "luma": [photo(), slide(), slide(paper="black", ink="white"), flat(4), flat(251)],
    "saturation": [photo(), slide(), flat(128), flat((200, 30, 30)), flat((10, 0, 0))],
    "image_quality": [photo(), slide(), noise(8)],
    "compression": [photo(), slide(), drawing()],
    "abnormal": [photo(), slide(), flat(side=8)],
}
DROP = {
    "entropy": dict(too_plain=[flat()], too_busy=[noise(), noise(80)]),
    "blur": dict(blurry=[photo().filter(ImageFilter.GaussianBlur(9)), photo(side=64).resize((32, 32)).resize((1024, 1024)), flat()]),
    "luma": dict(too_dark=[flat(2)], too_bright=[flat(253)]),
    "saturation": dict(oversaturated=[flat((240, 20, 20)), flat((0, 255, 0))]),
    "image_quality": dict(low_quality=[noise(60), photo(side=256).resize((1500, 1500)), flat()]),
}


@pytest.mark.parametrize("name", KEEP)
def test_defaults_keep_photographs_slides_and_drawings(name):
  for place, image in enumerate(KEEP[name]):
    assert apply(name, as_sample(image)) is None, place


@pytest.mark.parametrize("name", DROP)
def test_defaults_drop_what_they_look_for(name):
  for reason, image in ((reason, image) for reason, images in DROP[name].items() for image in images):
    drop = apply(name, as_sample(image))
    assert drop is not None and drop.reason == reason
    assert ("above" in drop.detail or "below" in drop.detail) and any(letter.isdigit() for letter in drop.detail)


@pytest.mark.parametrize("name, low, measure", [
    ("entropy", "min_bits", lambda one: measures.histogram_entropy(measures.shrink(one.gray, 256))),
    ("blur", "min_variance", lambda one: measures.laplacian_variance(measures.shrink(one.gray, 256))),
    ("luma", "min_mean", lambda one: one.gray.mean()),
    ("image_quality", "min_quality", lambda one: measures.technical_quality(one.gray)[0])])
def test_thresholds_are_met_exactly(name, low, measure):
  value = float(measure(as_sample(photo())))
  assert apply(name, as_sample(photo()), **{low: value}) is None
  assert apply(name, as_sample(photo()), **{low: value * 1.001}) is not None


def test_measures_have_known_values_and_take_one_pixel():
  for levels, bits in ((range(256), 8), ((0, 255), 1), ((7, 7), 0)):
    assert measures.histogram_entropy(np.array([levels], np.uint8)) == pytest.approx(bits)
  assert measures.mean_saturation(np.array(flat((200, 100, 100)))) == pytest.approx(0.5, abs=0.01)
  for sigma in (4, 12):
    gray = (128 + np.random.default_rng(1).normal(0, sigma, (400, 400))).clip(0, 255).astype(np.uint8)
    assert measures.technical_quality(gray)[1] < measures.laplacian_variance(gray) / 10
    gray[:, :200] = 255  # says nothing of noise
    assert measures.noise_sigma(gray) == pytest.approx(sigma, rel=0.05)
  bands = np.repeat(np.random.default_rng(2).integers(100, 120, (64, 1), np.uint8), 8, axis=0).repeat(512, axis=1)
  for gray in (bands, bands.T):
    assert measures.texture_entropy(gray) == 0 and measures.blockiness(gray) > 2
  assert measures.technical_quality(np.array(photo().convert("L")))[0] > measures.technical_quality(np.array(noise(20).convert("L")))[0]
  for name in KEEP:
    apply(name, as_sample(flat(side=1)))
  for shape, shrunk in (((10, 3000), (10, 3000)), ((1000, 500), (500, 250))):
    assert measures.shrink(np.zeros(shape, np.uint8), 250).shape == shrunk


def test_compression_reads_tables_and_sees_blocks():
  assert measures.jpeg_quality(encode(photo())) is None
  for quality in (1, 5, 30, 50, 70, 75, 90, 95, 100):
    assert measures.jpeg_quality(encode(drawing(), "JPEG", quality=quality)) == quality
  assert apply("compression", as_sample(photo(), kind="JPEG", quality=70)) is None
  drop = apply("compression", as_sample(photo(), kind="JPEG", quality=69))
  assert drop.reason == "low_jpeg_quality" and "quality 69, below 70" in drop.detail
  bad = Image.open(io.BytesIO(encode(photo(), "JPEG", quality=5)))
  for kind, options in (("PNG", {}), ("JPEG", dict(quality=95))):  # saved again, the tables say nothing
    drop = apply("compression", as_sample(bad.convert("RGB"), kind=kind, **options))
    assert drop.reason == "blocky" and "above 1.6" in drop.detail
  design = flat(230, 512)  # on a grid of eight pixels
  for place in range(8, 500, 32):
    ImageDraw.Draw(design).rectangle((place, 8, place + 15, 495), fill=(30, 60, 90))
  assert apply("compression", as_sample(design)) is None


def test_hash_survives_encoding_and_scaling_and_tells_pictures_apart():
  hashes = [measures.perceptual_hash(np.array(photo(seed))) for seed in range(6)]
  for seed, one in enumerate(hashes):
    image = photo(seed)
    for again in (Image.open(io.BytesIO(encode(image, "JPEG", quality=60))), image.resize((256, 256))):
      assert (one ^ measures.perceptual_hash(np.array(again))).bit_count() <= 4
    assert 0 <= one < 2 ** 64 and all((one ^ other).bit_count() > 4 for other in hashes[:seed])


def test_qr_codes_are_dropped():
  code = cv2.resize(cv2.QRCodeEncoder.create().encode("https://example.org"), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
  image = photo()
  image.paste(Image.fromarray(code), (300, 300))
  assert "A QR code of 19 characters" in apply("abnormal", as_sample(image)).detail


def test_token_length_takes_captions_out(tokenizer):
  sample = as_sample(drawing(), "a cat on a mat", "x" * 30, "  ", "I'm sorry, I can't describe this.")
  assert apply("token_length", sample, tokenizer=tokenizer, max_tokens=20) is None
  assert [one.text for one in sample.captions] == ["a cat on a mat"] and sample.tags == {"captions_dropped": 3}
  text = "zqzqzqzq"  # a token per letter: none was seen twice; the template is not counted
  assert apply("token_length", as_sample(drawing(), text), tokenizer=tokenizer, max_tokens=8, min_tokens=8) is None
  drop = apply("token_length", as_sample(drawing(), text), tokenizer=tokenizer, max_tokens=7)
  assert drop.reason == "no_caption" and "8 tokens, above 7" in drop.detail
  assert "8 tokens, below 9" in apply("token_length", as_sample(drawing(), text), tokenizer=tokenizer, min_tokens=9).detail
  assert apply("token_length", Sample("x", encode(drawing())), tokenizer=tokenizer) is None, "one that came without is wanted without"


@pytest.mark.parametrize("text, refused", [
    ("I'm sorry, but I cannot help with that.", True), ("I’m sorry I can’t see the picture", True), ("Sorry, as an AI I only read", True),
    ("As an AI language model, I", True), ("I cannot describe this image", True), ("I am unable to view images", True),
    ('"Unfortunately, I can\'t identify people', True), ("抱歉，我无法查看图片", True), ("我无法描述这张图片", True),
    ("作为一个AI语言模型", True), ("A poster that says \"I'm sorry, I can't\"", False), ("Sorry sign on a door", False),
    ("Sorry as graffiti", False), ("I cannot wait, says the dog", False), ("我的猫", False), ("As an airplane lands", False)])
def test_refusals_are_told_from_captions(tokenizer, text, refused):
  drop = apply("token_length", as_sample(drawing(), text), tokenizer=tokenizer)
  assert (drop is not None) == refused and (not refused or "refusal" in drop.detail)


def test_listed_keeps_or_drops_keys(tmp_path):
  path = tmp_path / "keys.txt"
  path.write_text("set/1\n\nset/9 ä\n", encoding="utf-8")
  mine, other = as_sample(drawing()), Sample("set/2")
  settings = dict(stage="S6", path=str(path))
  assert apply("listed", mine, **settings) is None and apply("listed", other, **settings).reason == "not_listed"
  assert apply("listed", mine, mode="drop", **settings).reason == "listed" and apply("listed", other, mode="drop", **settings) is None


def test_text_is_measured_once_per_sample(monkeypatch):
  sample, empty = as_sample(slide(16, lines=3, side=512)), as_sample(photo())
  assert apply("text_rich", sample) is None and apply("text_rich", empty) is None
  assert sample.tags["has_text"] and sample.tags["num_text_boxes"] == 3
  assert 0.005 < sample.tags["text_share"] < 0.1 and 16 <= sample.tags["smallest_text_px"] <= 26
  assert empty.tags == {"has_text": False, "num_text_boxes": 0, "text_share": 0.0, "smallest_text_px": 0.0}
  assert ocr.text_boxes(sample)[1].text.replace(" ", "") == "Reportofquarter1"
  monkeypatch.setattr(ocr, "read_text", lambda pixels: pytest.fail("read again"))
  assert apply("small_text", sample) is None and apply("small_text", empty) is None
  drop = apply("small_text", sample, base_px=128)
  assert drop.reason == "small_text" and "3 of 3 lines" in drop.detail
  assert apply("small_text", sample, base_px=128, max_share=1.0) is apply("small_text", sample, base_px=128, min_lines=4) is None
  assert "lower than 30 px" in apply("small_text", sample, base_px=4096, min_char_px=30).detail  # reduced, never enlarged


def test_nsfw_and_aesthetic_by_onnx(tmp_path):
  mean = tmp_path / "mean.onnx"
  mean.write_bytes(onnx_model(MEAN))
  settings = dict(model=str(mean), input_px=16)
  sample = as_sample(flat(204))  # (0.8 - 0.5) / 0.5
  assert apply("nsfw", sample, max_score=0.61, **settings) is None and sample.tags["nsfw"] == pytest.approx(0.6, abs=1e-3)
  assert "0.600 is above 0.59" in apply("nsfw", sample, max_score=0.59, **settings).detail
  assert apply("aesthetic", sample, min_score=0.59, stage="S4", **settings) is None
  assert apply("aesthetic", sample, min_score=0.61, stage="S4", **settings).reason == "unaesthetic"
  assert apply("nsfw", as_sample(flat(204)), max_score=0.31, mean=(0.5, 0.5, 0.5), std=[1, 1, 1], **settings) is None


def test_one_number_of_an_output_is_chosen(tmp_path):
  path = tmp_path / "channels.onnx"
  path.write_bytes(onnx_model(("ReduceMean", ["pixels"], "score", dict(axes=(3,), keepdims=0))))
  image = Image.new("RGB", (16, 16))
  image.paste((255, 0, 0), (0, 0, 16, 8))  # red above black: 8 rows of ones, and 40 of minus ones
  settings, sample = dict(model=str(path), input_px=16), as_sample(image)
  with pytest.raises(ValueError, match="gives 48 numbers per sample: set index"):
    apply("nsfw", sample, **settings)
  assert apply("nsfw", sample, index=0, **settings).reason == "nsfw" and apply("nsfw", sample, index=15, **settings) is None
  apply("nsfw", sample, index=0, softmax=True, **settings)
  assert sample.tags["nsfw"] == pytest.approx(np.e / (8 * np.e + 40 / np.e))
  with pytest.raises(ValueError, match="no output 'logits': it has score"):
    apply("nsfw", sample, output="logits", **settings)


def test_alignment_takes_captions_out_by_onnx(tmp_path, tokenizer):
  model, words = tmp_path / "clip.onnx", tmp_path / "tokenizer.json"
  model.write_bytes(onnx_model(*MEAN_AND_NUMBER_OF_IDS, ids=True))
  tokenizer.save(words)
  settings = dict(model=str(model), text_tokenizer=str(words), input_px=16)
  # 0.6 of the picture, one more than there are tokens: 2 and 6.
  sample = as_sample(flat(204), "zq", "zqzqzq")
  assert apply("alignment", sample, min_score=7.5, **settings) is None
  assert [one.text for one in sample.captions] == ["zqzqzq"] and sample.tags["alignment"] == pytest.approx(7.6, abs=1e-3)
  assert "7.600 is below 8" in apply("alignment", sample, min_score=8.0, **settings).detail
  sample = as_sample(flat(204), "zqzqzq")
  assert apply("alignment", sample, min_score=4.5, max_tokens=3, **settings) is None and sample.tags["alignment"] < 5
  edit = Sample("set/2", encode(flat()), [Caption("zq")], [encode(flat())])
  assert apply("alignment", edit, min_score=9.0, **settings) is None and edit.tags == {"alignment_skipped": "edit"}


def test_callables_score(tmp_path, monkeypatch):
  (tmp_path / "my_scores.py").write_text("def words(sample):\n  return len(sample.captions[0].text.split())\ndef nothing(sample):\n  return None\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  sample = as_sample(flat(), "one", "one two three")
  assert apply("alignment", sample, model="my_scores:words", min_score=2.0) is None and len(sample.captions) == 1
  with pytest.raises(ValueError, match="my_scores:nothing gives None for set/1"):
    apply("nsfw", sample, model="my_scores:nothing")
  with pytest.raises(ValueError, match="no callable 'wrods'"):
    apply("nsfw", sample, model="my_scores:wrods")


def test_models_that_give_no_number_stop(tmp_path):
  path, broken = tmp_path / "log.onnx", tmp_path / "broken.onnx"
  path.write_bytes(onnx_model(("ReduceMean", ["pixels"], "mean", dict(keepdims=0)), ("Log", ["mean"], "score", {})))
  broken.write_bytes(b"no model")
  assert apply("nsfw", as_sample(flat(204)), model=str(path), input_px=16) is None
  with pytest.raises(ValueError, match=r"log.onnx gives .*nan.* for set/1"):
    apply("nsfw", as_sample(flat(20)), model=str(path), input_px=16)
  with pytest.raises(ValueError, match="broken.onnx is no ONNX model"):
    apply("nsfw", as_sample(flat(20)), model=str(broken))


@pytest.mark.parametrize("entries, message", [
    ([dict(name="min_resolutoin", stage="S1")], "Unknown operator 'min_resolutoin'; did you mean 'min_resolution'"),
    ([dict(name="blur", stage="S1", min_varance=3)], "threshold of operator 'blur' in S1: 'min_varance'; did you mean 'min_variance'"),
    ([dict(name="broken", stage="S1", min_px=3)], "it has no thresholds"), ([dict(name="blur", stage="S7")], "Unknown stage .*'S7'"),
    ([dict(name="blur")], "has no stage"), ([dict(stage="S1")], "has no name"),
    ([dict(name="blur", stage="S4"), dict(name="luma", stage="S1")], "'luma' of S1 comes after 'blur' of S4: sort"),
    ([dict(name="duplicate", stage="S1")] * 2, "list it once, in S1"), ([dict(name="duplicate", stage="S4")], "list it once, in S1"),
    ([dict(name="duplicate", stage="S1", max_distance=64)], "max_distance=64: give 0 to 63"),
    ([dict(name="blur", stage="S1", side_px="big")], "side_px='big': give a value like its default, 256"),
    ([dict(name="rotation", stage="S1", drop_rotated=1)], "drop_rotated=1"), ([dict(name="blur", stage="S1", side_px=True)], "side_px=True"),
    ([dict(name="luma", stage="S1", min_mean=253)], "not below max_mean"),
    ([dict(name="nsfw", stage="S1")], "Operator 'nsfw' of S1 wants a model: set model"),
    ([dict(name="aesthetic", stage="S4", model="/none/a.onnx")], "Operator 'aesthetic' of S4 wants the model /none/a.onnx, which is no file"),
    ([dict(name="nsfw", stage="S1", model="no_such.module:score")], "no such module"), ([dict(name="token_length", stage="S1")], "a tokenizer"),
    ([dict(name="listed", stage="S6")], "'listed' of S6 wants path, .* no file ''"), ([dict(name="listed", stage="S6", mode="kept")], "mode='kept'"),
    ([dict(name="alignment", stage="S1", model=__file__)], "wants text_tokenizer")])
def test_bad_lists_are_named(entries, message):
  with pytest.raises(ValueError, match=message) as caught:
    make_operators(entries)
  assert str(caught.value).endswith((".", "?"))


def test_configs_build_and_name_what_they_leave_out(tokenizer):
  steps = make_operators(curation.get_config().operators, tokenizer)
  assert missing_report_operators(steps) == ["S1 nsfw", "S1 alignment", "S4 aesthetic", "S6 listed"]
  assert len(missing_report_operators([])) == 14
  assert [(step.apply, step.settings) for step in make_operators([dict(name="duplicate", stage="S1")])] == [(None, {"max_distance": 4})]
  assert [step.stage for step in make_operators(curation.get_config("small").operators, tokenizer)] == ["S1"] * 7
  with pytest.raises(ValueError, match="'nsfw' of S1 wants a model"):
    make_operators(curation.get_config("full").operators, tokenizer)
  full = curation.get_config("full").operators
  assert {one.name for one in full} == set(OPERATORS) - {"listed"}
  assert [full[place].name for place in (3, 9, 13)] == ["nsfw", "alignment", "aesthetic"]  # as the config's first lines say


def test_configs_spell_out_all_thresholds_and_s1_has_the_defaults():
  for entry in curation.get_config("full").operators:
    settings = {key: value for key, value in entry.items() if key not in ("name", "stage")}
    defaults = {one.name: one.default for one in dataclasses.fields(OPERATORS[entry.name]) if one.name != "tokenizer"}
    assert settings.keys() == defaults.keys(), entry.name
    assert settings == defaults or entry.stage != "S1", entry.name


def test_steps_travel_and_repeat(tokenizer):
  entries = [one for one in curation.get_config().operators if one.name not in ("duplicate", "small_text")]
  results, steps = [], make_operators(entries, tokenizer)
  for copy in (steps, pickle.loads(pickle.dumps(steps))):
    sample = as_sample(photo(side=1100))
    results.append(([step.apply(sample) for step in copy], sample.tags))
  assert results[0][0][:12] == [None] * 12  # all of S1 and S4
  assert results[0] == results[1]
