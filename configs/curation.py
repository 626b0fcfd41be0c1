"""Curation: which of your pictures are trained on, in the order of the Qwen-Image-2.0 report (arXiv 2605.10730, section 2.3).

What to expect. Every picture walks down the list up to the first operator that objects: S1 is for training at 256 px, S4 at 1024 px, S5 at
2048 px, S6 for fine-tuning; S2 and S3 of the report add data and filter nothing. The report gives no thresholds: these are ours, mild in S1
and strict in S6. S4 takes far longer than the others, nearly all of it for finding text.

Left out are the three judgements that need a model of yours (see data_pipelines/curation/scorers.py): the argument "full" lists them, with
an empty `model` to be filled on the command line, and text tags. Manual curation is one more entry, which ":listed" has behind the first.

Command:
  python -m launch.prepare_data --source=DIR --name=NAME --out=DIR --config=configs/curation.py
Thresholds are addressed by their place in the list:
  --config.operators[1].min_px=128
With models, three for nsfw, alignment and aesthetic:
  --config=configs/curation.py:full --config.operators[3].model=/models/nsfw.onnx --config.operators[9].model=my_clip:score
  --config.operators[9].min_score=0.25 --config.operators[13].model=/models/aesthetic.onnx
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  """Curation of photographs, designs and drawings; `arg` is "", "full" (also with models and text tags), "listed" (samples of a list
  of keys alone) or "small" (pictures of 64 px)."""
  if arg not in ("", "full", "listed", "small"):
    raise ValueError(f'No such argument {arg!r}: give "", "full", "listed" or "small".')
  cfg = ConfigDict()
  steps = _small() if arg == "small" else _report(models=arg == "full")
  if arg == "listed":
    steps.insert(1, dict(name="listed", stage="S1", path="", mode="keep"))  # config.operators[1].path: a file with a key on each line
  cfg.operators = tuple(ConfigDict(one) for one in steps)
  cfg.encode = ConfigDict(dict(max_px=2048, format="webp", quality=95, synthetic_format="png", alpha=False))  # webp, jpeg or png
  # alpha: whether a picture that is encoded anew keeps its transparency, to be trained on; else it is laid on white paper
  cfg.reading = ConfigDict(dict(captions="ask", uncaptioned="drop", picture_root=""))
  # captions: what a caption file of several lines is, "whole" (one text) or "lines" (a caption each); uncaptioned: what becomes of a picture without,
  # "drop", "keep" (for a VAE) or "file_name" (its caption); picture_root: folder that a table's paths are below, where it is not the table's own
  cfg.samples_per_unit = 512  # of work, which is done or redone as a whole
  cfg.shard_gb = 2.0  # of a file of records: a unit's go into one with those of the next, up to so much
  cfg.validation_share = 0.02
  cfg.tokenizer = ""  # a tokenizer.json or its folder; empty to train one on the captions
  cfg.vocab_size = 8192  # of the trained one
  return cfg


def _report(models: bool) -> list[dict]:
  """The report's funnel; with Qwen-Image 1.x's blur, luma, saturation, abnormal and small_text (arXiv 2508.02324, section 3.2)."""
  image_model = dict(model="", input_px=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), output="", index=-1, softmax=False)
  text_model = dict(image_model, text_tokenizer="", max_tokens=77, pad_id=-1)
  steps = [
      dict(name="broken", stage="S1"),
      dict(name="min_resolution", stage="S1", min_px=256, min_side_px=0, max_aspect=0.0),
      dict(name="duplicate", stage="S1", max_distance=4),
      dict(name="nsfw", stage="S1", max_score=0.5, **image_model),
      dict(name="rotation", stage="S1", drop_rotated=False),
      dict(name="entropy", stage="S1", min_bits=0.05, max_texture_bits=7.5, side_px=256),
      dict(name="blur", stage="S1", min_variance=20.0, side_px=256),
      dict(name="luma", stage="S1", min_mean=3.0, max_mean=252.0),
      dict(name="saturation", stage="S1", max_mean=0.9),
      dict(name="alignment", stage="S1", min_score=0.2, **text_model),
      dict(name="token_length", stage="S1", min_tokens=1, max_tokens=1024),
      dict(name="min_resolution", stage="S4", min_px=1024, min_side_px=0, max_aspect=0.0),
      dict(name="image_quality", stage="S4", min_quality=0.3, side_px=1024),
      dict(name="aesthetic", stage="S4", min_score=4.5, **image_model),
      dict(name="compression", stage="S4", min_quality=70, max_blockiness=1.6),
      dict(name="abnormal", stage="S4"),
      dict(name="text_rich", stage="S4"),  # tags; small_text uses what it read
      dict(name="small_text", stage="S4", min_char_px=12.0, base_px=1024, max_share=0.5, min_lines=3),
      dict(name="min_resolution", stage="S5", min_px=2048, min_side_px=0, max_aspect=0.0),
      dict(name="entropy", stage="S6", min_bits=0.2, max_texture_bits=7.0, side_px=256),
      dict(name="blur", stage="S6", min_variance=50.0, side_px=512),
      dict(name="luma", stage="S6", min_mean=15.0, max_mean=245.0),
      dict(name="saturation", stage="S6", max_mean=0.8),
      dict(name="image_quality", stage="S6", min_quality=0.6, side_px=1024),
      dict(name="compression", stage="S6", min_quality=85, max_blockiness=1.3),
  ]
  return steps if models else [one for one in steps if "model" not in one and one["name"] != "text_rich"]


def _small() -> list[dict]:
  """For pictures of some 64 px, such as emoji and letters, whose colours may be pure and papers white."""
  return [
      dict(name="broken", stage="S1"),
      dict(name="min_resolution", stage="S1", min_px=32, min_side_px=0, max_aspect=0.0),
      dict(name="duplicate", stage="S1", max_distance=4),
      dict(name="rotation", stage="S1", drop_rotated=False),
      dict(name="entropy", stage="S1", min_bits=0.05, max_texture_bits=7.5, side_px=64),
      dict(name="blur", stage="S1", min_variance=20.0, side_px=64),
      dict(name="token_length", stage="S1", min_tokens=1, max_tokens=1024),
  ]
