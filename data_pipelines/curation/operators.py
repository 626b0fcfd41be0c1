"""The filters of the funnel, in the report's order, and the list of them that a config spells out.

An operator takes a `Sample` and returns None to keep it or a `Drop`; it may write `sample.tags`, and those that judge captions take out bad
ones in place. Its fields are its thresholds with their defaults. Operators look at the target picture; `broken` alone looks at condition
images too. A picture that does not decode is a `ValueError` in all of them but `broken`, so that one comes first.

Sources: Qwen-Image-2.0 report, arXiv 2605.10730, section 2.3, for the order; Qwen-Image report, arXiv 2508.02324, section 3.2, for what
the filters look for. Neither gives thresholds nor formulas: those here are ours, checked on some thirty photographs, slides and drawings.
"""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from data_pipelines.curation import measures, ocr, scorers
from data_pipelines.curation.sample import Drop, Sample
from data_pipelines.tokenizer import PromptTokenizer

STAGES = ("S1", "S2", "S3", "S4", "S5", "S6")
# What the report's funnel names, as (stage, operator). S2 and S3 add data and filter nothing; S6 also repeats earlier ones more strictly.
REPORT_ORDER = (
    ("S1", "broken"), ("S1", "min_resolution"), ("S1", "duplicate"), ("S1", "nsfw"), ("S1", "rotation"), ("S1", "entropy"),
    ("S1", "alignment"), ("S1", "token_length"), ("S4", "min_resolution"), ("S4", "image_quality"), ("S4", "aesthetic"),
    ("S4", "compression"), ("S5", "min_resolution"), ("S6", "listed"))
# How captioning models refuse, at the start of a caption, in English and Chinese.
_REFUSALS = re.compile(
    r"((i'?m|i am|we'?re|we are) )?((very|so|terribly|really) )?sorry([,.;:!]* (but )?(i|we)\b|[,.;:!] (but )?as\b)"
    r"|(unfortunately,? )?(i|we)( can'?t|'m unable to| cannot| can not| am unable to| am not able to| won'?t| do not| don'?t) "
    r"(help|assist|describe|provide|view|analy[sz]e|identify|comply|process|access|generate|fulfill|caption|have the ability)"
    r"|as an? (ai|artificial intelligence|(large )?language model)\b"
    r"|(很|非常)?(抱歉|对不起)[,，。!！ ]*(但是?)?(我|作为)|我(无法|不能)(描述|查看|看到|提供|识别|协助|帮助|回答|生成)"
    r"|作为(一个|一款|一名)?(ai|人工智能|(大型)?语言模型)", re.IGNORECASE)


class Operator(Protocol):
  """A filter."""

  def __call__(self, sample: Sample) -> Drop | None:
    """Returns None to keep the sample, or why it is dropped."""


@dataclasses.dataclass(frozen=True)
class Step:
  """An operator at its place in the funnel; `apply` is None for "duplicate", which needs to see all samples. `settings` has all thresholds."""
  name: str
  stage: str
  apply: Operator | None
  settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Broken:
  """Drops what the source could not read, and pictures or condition images that do not decode. Of an animation the first frame counts."""

  def __call__(self, sample: Sample) -> Drop | None:
    if sample.error:
      return Drop("unreadable", sample.error)
    try:
      _ = sample.pixels, sample.source_pixels, sample.rejected_pixels
    except ValueError as error:
      return Drop("undecodable", str(error))
    return None


@dataclasses.dataclass(frozen=True)
class MinResolution:
  """Drops pictures of fewer than min_px^2 pixels, with a side below min_side_px, or with sides further than max_aspect:1 apart (0: any)."""
  min_px: int = 256
  min_side_px: int = 0
  max_aspect: float = 0.0

  def __call__(self, sample: Sample) -> Drop | None:
    height, width = sample.pixels.shape[:2]
    if height * width < self.min_px ** 2:
      return Drop("too_small", f"{width} x {height} px are fewer than {self.min_px}^2.")
    if min(height, width) < self.min_side_px:
      return Drop("too_small", f"{width} x {height} px have a side below {self.min_side_px} px.")
    aspect = max(height, width) / min(height, width)
    if self.max_aspect and aspect > self.max_aspect:
      return Drop("too_long", f"{width} x {height} px have sides {aspect:.2f}:1, above {self.max_aspect}:1.")
    return None


@dataclasses.dataclass(frozen=True)
class Duplicate:
  """Keeps one of several pictures whose `measures.perceptual_hash` differs in at most max_distance of 64 bits; done over all samples."""
  max_distance: int = 4

  def __post_init__(self):
    if not 0 <= self.max_distance < measures.HASH_BITS:
      raise ValueError(f"has max_distance={self.max_distance}: give 0 to {measures.HASH_BITS - 1} bits.")


@dataclasses.dataclass(frozen=True)
class Nsfw(scorers.ImageScorer):
  """Drops pictures that the user's model scores above max_score, in the model's unit; 0.5 suits a probability. Tag: nsfw."""
  max_score: float = 0.5

  def __call__(self, sample: Sample) -> Drop | None:
    score = sample.tags["nsfw"] = self.score(sample)
    return Drop("nsfw", f"The score {score:.3f} is above {self.max_score}.") if score > self.max_score else None


@dataclasses.dataclass(frozen=True)
class Rotation:
  """Drops pictures whose EXIF orientation is not a number from 0 (unknown) to 8: which side is up cannot be told.

  Turned pictures (2 to 8) are set upright by decoding and tagged exif_orientation; drop_rotated drops them, as Qwen-Image 1.x did.
  """
  drop_rotated: bool = False

  def __call__(self, sample: Sample) -> Drop | None:
    orientation = measures.exif_orientation(sample.image)
    if not 0 <= orientation <= 8:
      return Drop("bad_orientation", "The EXIF orientation is not a number from 0 to 8.")
    if orientation > 1:
      sample.tags["exif_orientation"] = orientation
      if self.drop_rotated:
        return Drop("rotated", f"The EXIF orientation is {orientation}, not 1.")
    return None


@dataclasses.dataclass(frozen=True)
class Entropy:
  """Drops flat pictures (gray histogram below min_bits, after averaging down to a short side of side_px) and noise-like ones.

  Noise-like: `measures.texture_entropy` at the scale of the file above max_texture_bits. A page with one line of text has 0.09 bits; grass
  has 6.5 bits of texture, white noise 7.9.
  """
  min_bits: float = 0.05
  max_texture_bits: float = 7.5
  side_px: int = 256

  def __call__(self, sample: Sample) -> Drop | None:
    bits = measures.histogram_entropy(measures.shrink(sample.gray, self.side_px))
    if bits < self.min_bits:
      return Drop("too_plain", f"The gray histogram has {bits:.3f} bits, below {self.min_bits}.")
    bits = measures.texture_entropy(sample.gray)
    if bits > self.max_texture_bits:
      return Drop("too_busy", f"The texture has {bits:.2f} bits per pixel, above {self.max_texture_bits}.")
    return None


@dataclasses.dataclass(frozen=True)
class Blur:
  """Drops pictures whose Laplacian, after averaging down to a short side of side_px, has a variance below min_variance."""
  min_variance: float = 20.0
  side_px: int = 256

  def __call__(self, sample: Sample) -> Drop | None:
    variance = measures.laplacian_variance(measures.shrink(sample.gray, self.side_px))
    if variance < self.min_variance:
      return Drop("blurry", f"The Laplacian's variance at {self.side_px} px is {variance:.1f}, below {self.min_variance}.")
    return None


@dataclasses.dataclass(frozen=True)
class Luma:
  """Drops pictures whose mean luma, 0 black to 255 white, is below min_mean or above max_mean; slides on white reach 251, on black 4."""
  min_mean: float = 3.0
  max_mean: float = 252.0

  def __post_init__(self):
    if self.min_mean >= self.max_mean:
      raise ValueError(f"has min_mean={self.min_mean}, not below max_mean={self.max_mean}: nothing would be kept.")

  def __call__(self, sample: Sample) -> Drop | None:
    mean = float(sample.gray.mean())
    if mean < self.min_mean:
      return Drop("too_dark", f"The mean luma is {mean:.1f}, below {self.min_mean}.")
    return Drop("too_bright", f"The mean luma is {mean:.1f}, above {self.max_mean}.") if mean > self.max_mean else None


@dataclasses.dataclass(frozen=True)
class Saturation:
  """Drops pictures whose mean HSV saturation, 0 to 1, is above max_mean; gray pictures are kept."""
  max_mean: float = 0.9

  def __call__(self, sample: Sample) -> Drop | None:
    mean = measures.mean_saturation(sample.pixels)
    return Drop("oversaturated", f"The mean saturation is {mean:.3f}, above {self.max_mean}.") if mean > self.max_mean else None


@dataclasses.dataclass(frozen=True)
class Alignment(scorers.TextImageScorer):
  """Takes out captions that the user's model scores below min_score with the picture; drops samples that are left without.

  0.2 suits a cosine of CLIP; logits and probabilities need another. An instruction does not describe its target, so edits are not scored
  and say so in the tag alignment_skipped. Tag: alignment, the best score.
  """
  min_score: float = 0.2

  def __call__(self, sample: Sample) -> Drop | None:
    if sample.sources:
      sample.tags["alignment_skipped"] = "edit"
      return None
    scores = [self.score_caption(sample, caption) for caption in sample.captions]
    sample.tags["alignment"] = max(scores, default=None)
    return _take_out(sample, "misaligned", ["" if score >= self.min_score else f"its score {score:.3f} is below {self.min_score}"
                                            for score in scores])


@dataclasses.dataclass(frozen=True)
class TokenLength:
  """Takes out captions of fewer than min_tokens or more than max_tokens, template not counted, and refusals; drops samples left without.

  Refusals are texts that begin as captioning models do when they decline ("I'm sorry, I can't ...", "As an AI ...", "抱歉，我无法 ...").
  The report has prompts "up to 1K tokens".
  """
  min_tokens: int = 1
  max_tokens: int = 1024
  tokenizer: PromptTokenizer | None = None

  def __post_init__(self):
    if self.tokenizer is None:
      raise ValueError("wants a tokenizer: give a tokenizer.json, or let one be trained on the captions.")

  def __call__(self, sample: Sample) -> Drop | None:
    return _take_out(sample, "no_caption", [self._fault(caption.text, bool(sample.sources)) for caption in sample.captions])

  def _fault(self, text: str, edit: bool) -> str:
    if _REFUSALS.match(text.replace("’", "'").strip(" \n\"'“")):
      return "it is a refusal"
    # The empty prompt is one space, a token that is not template.
    empty, whole = self.tokenizer.count(["", text], edit)
    tokens = whole - empty + 1 if text.strip() else 0
    if self.min_tokens <= tokens <= self.max_tokens:
      return ""
    return f"it has {tokens} tokens, " + (f"below {self.min_tokens}" if tokens < self.min_tokens else f"above {self.max_tokens}")


def _take_out(sample: Sample, reason: str, faults: list[str]) -> Drop | None:
  """Takes captions with a fault out in place; returns a `Drop` if none is left."""
  dropped = sum(map(bool, faults))
  if dropped:
    sample.tags["captions_dropped"] = sample.tags.get("captions_dropped", 0) + dropped
  sample.captions[:] = [caption for caption, fault in zip(sample.captions, faults) if not fault]
  if sample.captions or not faults:  # one that came without is wanted without, see `data_pipelines.curation.reading`
    return None
  return Drop(reason, f"None of {len(faults)} captions is left, the first because {faults[0]}.")


@dataclasses.dataclass(frozen=True)
class ImageQuality:
  """Drops pictures whose `measures.technical_quality`, 0 to 1 of sharpness and noise, is below min_quality. Tag: image_quality.

  Measured after averaging down to a short side of side_px, the scale that training sees; enlarged pictures stay soft there.
  """
  min_quality: float = 0.3
  side_px: int = 1024

  def __call__(self, sample: Sample) -> Drop | None:
    quality, sharpness, sigma = measures.technical_quality(measures.shrink(sample.gray, self.side_px))
    sample.tags["image_quality"] = round(quality, 3)
    if quality < self.min_quality:
      return Drop("low_quality", f"The quality is {quality:.2f}, below {self.min_quality}: sharpness {sharpness:.0f}, noise {sigma:.1f}.")
    return None


@dataclasses.dataclass(frozen=True)
class Aesthetic(scorers.ImageScorer):
  """Drops pictures that the user's model scores below min_score, in the model's unit; 4.5 suits scores of 1 to 10. Tag: aesthetic."""
  min_score: float = 4.5

  def __call__(self, sample: Sample) -> Drop | None:
    score = sample.tags["aesthetic"] = self.score(sample)
    return Drop("unaesthetic", f"The score {score:.3f} is below {self.min_score}.") if score < self.min_score else None


@dataclasses.dataclass(frozen=True)
class Compression:
  """Drops JPEG files saved below min_quality (1 to 100) and, in any format, pictures with `measures.blockiness` above max_blockiness."""
  min_quality: int = 70
  max_blockiness: float = 1.6

  def __call__(self, sample: Sample) -> Drop | None:
    quality = measures.jpeg_quality(sample.image)
    if quality is not None and quality < self.min_quality:
      return Drop("low_jpeg_quality", f"The JPEG was saved at quality {quality}, below {self.min_quality}.")
    ratio = measures.blockiness(sample.gray)
    return Drop("blocky", f"Steps between blocks are {ratio:.2f} times others, above {self.max_blockiness}.") if ratio > self.max_blockiness else None


@dataclasses.dataclass(frozen=True)
class Abnormal:
  """Drops pictures with a QR code that can be read. Watermarks and bar codes are not looked for: bring a model, as for "aesthetic"."""

  def __call__(self, sample: Sample) -> Drop | None:
    text = measures.read_qr_code(sample.gray)
    return Drop("qr_code", f"A QR code of {len(text)} characters is in the picture, none is allowed.") if text else None


@dataclasses.dataclass(frozen=True)
class Listed:
  """Manual curation. `path` is a UTF-8 file of keys, one per line: mode "keep" drops all samples but these, mode "drop" drops these."""
  path: str = ""
  mode: str = "keep"

  def __post_init__(self):
    if self.mode not in ("keep", "drop"):
      raise ValueError(f'has mode={self.mode!r}: give "keep" or "drop".')
    if not os.path.isfile(self.path):
      raise ValueError(f"wants path, a file of keys, one per line: there is no file {self.path!r}.")

  def __call__(self, sample: Sample) -> Drop | None:
    if (sample.key in _read_keys(self.path)) == (self.mode == "keep"):
      return None
    return Drop("not_listed" if self.mode == "keep" else "listed", f"{self.path} has {'no ' * (self.mode == 'keep')}line {sample.key!r}.")


@functools.cache
def _read_keys(path: str) -> frozenset[str]:
  with open(path, encoding="utf-8-sig") as file:
    return frozenset(line.strip() for line in file if line.strip())


OPERATORS: dict[str, Callable[..., Any]] = {
    "broken": Broken, "min_resolution": MinResolution, "duplicate": Duplicate, "nsfw": Nsfw, "rotation": Rotation, "entropy": Entropy,
    "blur": Blur, "luma": Luma, "saturation": Saturation, "alignment": Alignment, "token_length": TokenLength,
    "image_quality": ImageQuality, "aesthetic": Aesthetic, "compression": Compression, "text_rich": ocr.TextRich, "small_text": ocr.SmallText,
    "abnormal": Abnormal, "listed": Listed}


def make_operators(entries: Sequence[dict[str, Any]], tokenizer: PromptTokenizer | None = None) -> list[Step]:
  """Returns the steps of a list such as [{"name": "min_resolution", "stage": "S1", "min_px": 256}], in its order.

  Cheap: models are loaded at the first sample, in each process. The same entries give the same steps.

  Raises:
    ValueError: an unknown operator, stage or threshold, a threshold of another type than its default or out of range, a missing model, file
      or tokenizer, stages that go back, or "duplicate" twice or outside S1.
  """
  steps = [_make_step(dict(entry), tokenizer) for entry in entries]
  for before, after in zip(steps, steps[1:]):
    if before.stage > after.stage:
      raise ValueError(f"Operator {after.name!r} of {after.stage} comes after {before.name!r} of {before.stage}: sort the list by stage.")
  stages = [step.stage for step in steps if step.name == "duplicate"]
  if stages not in ([], ["S1"]):
    raise ValueError(f"Operator 'duplicate' is listed for {', '.join(stages)}: list it once, in S1.")
  for step in steps:
    if step.name in ("alignment", "token_length") and step.stage != steps[0].stage:
      raise ValueError(f"Operator {step.name!r} of {step.stage} takes captions out, which all stages share: list it in {steps[0].stage}.")
  return steps


def missing_report_operators(steps: Sequence[Step]) -> list[str]:
  """Returns what the report's funnel has and the list leaves out, in the report's order, such as ["S1 nsfw", "S6 listed"]."""
  present = {(step.stage, step.name) for step in steps} | {("S6", "listed") for step in steps if step.name == "listed"}  # wherever it stands
  return [f"{stage} {name}" for stage, name in REPORT_ORDER if (stage, name) not in present]


def _make_step(entry: dict[str, Any], tokenizer: PromptTokenizer | None) -> Step:
  missing = {"name", "stage"} - set(entry)
  if missing:
    raise ValueError(f"The operator {entry} has no {' and no '.join(sorted(missing))}: add it to the list of operators.")
  name, stage = entry.pop("name"), entry.pop("stage")
  _check_known("operator", name, OPERATORS)
  _check_known(f"stage for operator {name!r}:", stage, STAGES)
  factory = OPERATORS[name]
  defaults = {field.name: field.default for field in dataclasses.fields(factory) if field.name != "tokenizer"}
  for key, value in entry.items():
    _check_known(f"threshold of operator {name!r} in {stage}:", key, defaults)
    if not _has_type_of(value, defaults[key]):
      raise ValueError(f"Operator {name!r} of {stage} has {key}={value!r}: give a value like its default, {defaults[key]!r}.")
  try:
    operator = factory(**entry, **(dict(tokenizer=tokenizer) if factory is TokenLength else {}))
  except ValueError as error:
    raise ValueError(f"Operator {name!r} of {stage} {error}") from error
  return Step(name, stage, None if factory is Duplicate else operator, defaults | entry)


def _check_known(what: str, value: Any, known: Sequence[str] | dict[str, Any]) -> None:
  if value not in known:
    close = difflib.get_close_matches(str(value), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known) or 'none, it has no thresholds'}."
    raise ValueError(f"Unknown {what} {value!r}; {hint}")


def _has_type_of(value: Any, default: Any) -> bool:
  """Whether a threshold has its default's type; whole numbers pass for floats, lists for tuples."""
  wanted = (int, float) if isinstance(default, float) else (list, tuple) if isinstance(default, tuple) else type(default)
  return isinstance(value, wanted) and isinstance(value, bool) == isinstance(default, bool)
