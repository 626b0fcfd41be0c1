"""Rendered text measured: how fast it is drawn, whether OCR reads it back, whether another renderer draws the same, and sheets to look at.

  python -m benchmarks.text_rendering --measure=speed [--base_px=256] [--num=400] [--kind=complex] [--pictures=FOLDER]
  python -m benchmarks.text_rendering --measure=ocr [--base_px=512] [--num=40] [--languages=en,zh-Hans] [--kind=complex]
  python -m benchmarks.text_rendering --measure=pango [--num=200] [--languages=en,ru,el,ar,he,hi,th,zh-Hans,ja,ko]
  python -m benchmarks.text_rendering --measure=nasty [--num=2000]
  python -m benchmarks.text_rendering --measure=memory [--base_px=128] [--num=100000] [--kind=complex]
  python -m benchmarks.text_rendering --measure=pod [--num=4096]
  python -m benchmarks.text_rendering --measure=tokens [--base_px=1024] [--num=1000] [--kind=complex] [--tokenizer=FILE]
  python -m benchmarks.text_rendering --measure=need [--num=100]
  python -m benchmarks.text_rendering --measure=sheet --out=F.png [--base_px=256] [--columns=6] [--languages=...] [--kind=complex] [--layout=menu]
  python -m benchmarks.text_rendering --measure=edits --out=F.png [--base_px=192] [--columns=2] [--languages=...] [--kind=complex]

speed: pictures with captions per second of processor time, median and range of rounds, and how many a core could draw if it did nothing but fill
outlines (the same glyphs, nothing else). ocr: 1 - edits / characters over all pictures, and the share of pictures read without an edit. pango: ink
boxes of strings beside those that pango-view draws unhinted at the same size, by width and height; needs Debian's pango1.0-tools. memory: of the
process, after each power of ten of pictures and their thirds, from all over the first 10^9. nasty: what becomes of strings that no one would write.
tokens: how many a caption has, without the template, in a tokenizer.json, or in one that is trained on the captions of a tenth of the pictures.
pod: which pictures 64 processes with 8 workers each read of `num` slots in three epochs, and far on. need: how many pictures a second a pod's runs
ask for, with a twentieth of their batches, and how many cores of each host draw them.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import multiprocessing
import pathlib
import pickle
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from PIL import Image

from data_pipelines.mixture import Mixture
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.text_rendering import drawing, languages, layout, words
from data_pipelines.text_rendering.fonts import FOLDERS, find_faces, typefaces
from data_pipelines.text_rendering.settings import BUDGETS, KINDS, RATIOS, Settings
from data_pipelines.text_rendering.source import RenderedText, WithEdits
from data_pipelines.text_rendering.stored import VOCAB_SIZE
from data_pipelines.tokenizer import PromptTokenizer, train_tokenizer
from launch import cli
from qimg2.evaluation import ocr
from qimg2.evaluation.text import score_text

ROUNDS = 5
REMEMBERED = 12  # templates that do not come again in a sheet
FAR, STRIDE = 10**9, 618_033_989  # pictures are taken from all over the first FAR: STRIDE has no factor in common with it
PANGO_PX, MARGIN_PX, AGREE_PX = 40, 60, 2


def source_of(base_px: int, codes: Sequence[str], ratios: Sequence[str] = RATIOS, kind: str = "pure", layout_name: str = "") -> RenderedText:
  """The pictures that are measured: of a kind, and of one layout or template of it where that is named; signs stand on those of --pictures."""
  named = {"pure": "layouts", "complex": "templates"}
  if layout_name and kind not in named:
    raise ValueError(f"--layout={layout_name} is for the kinds {' and '.join(named)}: leave it out with --kind={kind}.")
  only = {named[kind]: {layout_name: 1.0}} if layout_name else {}
  return RenderedText(Settings(base_px=base_px, languages=dict.fromkeys(codes, 1.0), ratios=tuple(ratios), kinds={kind: 1.0}, edits={},
                               pictures=flags.FLAGS.pictures, **only), "train", 2**20)


def speed(base_px: int, codes: Sequence[str], num: int, kind: str) -> str:
  """How many pictures are drawn, in a sentence."""
  source, settings, plain = source_of(base_px, codes, kind=kind), [], drawing.coverage
  for number in range(num):  # dictionaries and tables are read
    source.record(number)
  drawing.coverage = lambda setting, box: settings.append((setting, box)) or plain(setting, box)
  rates, bare = [], []
  for turn in range(1, ROUNDS + 1):
    settings.clear()
    begin = time.process_time()
    for number in range(turn * num, (turn + 1) * num):
      source.record(number)
    rates.append(num / (time.process_time() - begin))
    begin = time.process_time()
    for setting, box in settings:
      plain(setting, box)
    bare.append(num / (time.process_time() - begin))
  drawing.coverage = plain
  return (f"{kind}, {base_px} px, {len(codes)} languages: {statistics.median(rates):.0f} pictures per CPU second ({min(rates):.0f} to "
          f"{max(rates):.0f} in {ROUNDS} rounds of {num}); outlines alone {statistics.median(bare):.0f}")


def memory(base_px: int, codes: Sequence[str], num: int, kind: str) -> Iterator[str]:
  """Yields in sentences how much memory the process has after some of `num` pictures."""
  source, told = source_of(base_px, codes, kind=kind), {some * 10**power for some in (1, 3) for power in range(3, 10)} | {num}
  for number in range(1, num + 1):
    source.record(number * STRIDE % FAR)
    if number in told:
      yield f"{number} pictures of {base_px} px: {_resident_mib()} MiB"


def count_tokens(base_px: int, codes: Sequence[str], num: int, kind: str, path: str) -> str:
  """How many tokens the captions of pictures have, in a sentence.

  Raises:
    AssertionError: one has more than the settings allow.
  """
  plain = source_of(base_px, codes, kind=kind)
  said = (text for number in range(max(1, num // 10)) for text in plain.record(number)["captions"])
  tokenizer = PromptTokenizer.load(path) if path else train_tokenizer(said, VOCAB_SIZE)
  source, template, limit = RenderedText(plain.settings, "train", 2**20, tokenizer), int(tokenizer.count([""])[0]), min(base_px, BUDGETS[-1])
  counts = np.concatenate([tokenizer.count(source.record(number)["captions"][1:]) - template for number in range(num)])
  assert counts.max() <= limit, f"A caption has {counts.max()} tokens, {limit} are allowed."
  return (f"{kind} at {base_px} px, {len(codes)} languages, {num} pictures: captions that quote their texts have {np.median(counts):.0f} tokens in "
          f"the median, {np.percentile(counts, 95):.0f} or less in 95 of 100, and {counts.max()} at most, of {limit} that they may have")


def _resident_mib() -> int:
  """Memory that this process has now, in MiB."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) // 1024


# ---- strings that no one would write --------------------------------------------------------------------

_MARKS = [*map(chr, (*range(0x300, 0x370), *range(0x591, 0x5C8), *range(0x64B, 0x660), 0x93F, 0xE34))]
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u180e\ufe0f"
_CONTROLS, _SPACES, _PRIVATE = [*map(chr, range(32)), "\x7f", "\x85"], " \t\n\u00a0\u3000\u2028", "\ue000\ufffe\ufffd\u115f\u3164\u034f"
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2069\u200e\u200f"
_EMOJI = ("👩\u200d👩\u200d👧\u200d👦", "🇩🇪", "👍🏽", "❤\ufe0f\u200d🔥", "1\ufe0f\u20e3", "🏴\U000e0067\U000e0062\U000e007f")


def nasty_text(rng: np.random.Generator, code: str) -> str:
  """A string of a language that hardly anyone would write: any code points, stacks of marks, joiners, control characters, lone surrogates, mixed
  directions, words without end, or nothing."""
  some = lambda letters, num: "".join(letters[i] for i in rng.integers(len(letters), size=num))
  any_of = lambda low, high, num: "".join(map(chr, rng.integers(low, high, size=num)))
  known = languages.load(code).words
  word = lambda: known[rng.integers(len(known))]
  kinds = (
      lambda: any_of(0, 0x110000, 8), lambda: any_of(0x20, 0x3000, 12), lambda: any_of(0xD800, 0xE000, 1) + word(), lambda: "",
      lambda: word()[0] + some(_MARKS, int(rng.integers(1, 40))), lambda: word() + some(_EMOJI, 3), lambda: some(_INVISIBLE, 3).join(word()),
      lambda: some(_CONTROLS, 4) + word(), lambda: word() * int(rng.integers(2, 400)), lambda: some(_SPACES, 5), lambda: some(_PRIVATE, 4),
      lambda: some(_DIRECTIONS, 2) + word() + some("0123456789,.()", 5) + some(_DIRECTIONS, 2) + word())
  return " ".join(kinds[rng.integers(len(kinds))]() for _ in range(rng.integers(1, 4)))


def survey(num: int, codes: Sequence[str], folders: Sequence[str] = FOLDERS) -> collections.Counter:
  """What became of `num` nasty strings: "empty" when cleaned, "left out" for want of a glyph, "too long" for a line, or "set".

  Raises:
    AssertionError: one was set with a missing glyph, or outside of its frame.
  """
  faces, outcomes, side = find_faces(folders), collections.Counter(), 256
  fit = {code: typefaces(faces, languages.load(code)) for code in codes}
  for number in range(num):
    rng = np.random.default_rng((11, number))
    code = codes[rng.integers(len(codes))]
    text, typeface = words.clean(nasty_text(rng, code)).replace("\n", " ").strip(), fit[code][rng.integers(len(fit[code]))]
    outcome = "left out" if text and not typeface.covers(text) else "too long" if text else "empty"
    found = layout.fit([text], layout.Style(typeface, languages.load(code), 1.4), side, side, (10, 40)) if outcome == "too long" else None
    if found:
      outcome, slack = "set", layout.OVERHANG * found.size
      assert all(glyph.number for one in found.placed for glyph in one.line.glyphs), f"String {number} is set with a missing glyph."
      assert found.ink[0] >= -slack and found.ink[2] <= side + slack, f"String {number} is set outside of its frame."
      drawing.draw_on(Image.new("RGB", (side, side), "white"), found, (0, 0, 0))
    outcomes[outcome] += 1
  return outcomes


# ---- at the size of a pod -------------------------------------------------------------------------------

PROCESSES, WORKERS, ROWS = 64, 8, 8  # hosts, worker processes of each, and rows of a batch for each host
EPOCHS, FAR_BATCHES = 3, (10**6, 2**30)
RUNS = (("pretrain_256 on v5p-256", 256, 32768, 39.3, 32), ("cpt_1024 on v5p-256", 1024, 8192, 39.1, 32))  # px, batch, seconds a step at least, hosts
SHARE = 0.05  # of the batches


def count_pod(num_slots: int, base_px: int = 128) -> str:
  """What a pod's processes read of an endless data set of pictures and half as many edits, in a sentence; no picture is drawn but a few.

  Raises:
    AssertionError: a picture is read twice, one is missed in an epoch, or another process draws it otherwise.
  """
  settings = Settings(base_px=base_px, languages={"en": 1.0}, kinds={"pure": 1.0}, font_folders=("/none",))
  tokenizer = train_tokenizer(["A text in English."], 300)
  parts = [RenderedText(settings, "train", num, tokenizer, are_edits) for num, are_edits in ((num_slots, False), (num_slots // 2, True))]
  source = WithEdits(*parts)
  index = source.index()
  specs = [DatasetSpec("", "pictures"), DatasetSpec("", "edits", task="ti2i")]
  mixture = Mixture(specs, [Resolution(base_px, PROCESSES * ROWS)], 2**12, tokenizer, 0, find=lambda spec: (source, index, None, ()))
  seen, places, num, k = set(), collections.Counter(), collections.Counter(), 0
  while min(num[id(cell)] // len(cell.records) for cell in mixture.cells) < EPOCHS:
    plan = mixture.plan(k)
    num[id(plan.cell)] += len(plan.places)
    for host in range(PROCESSES):  # as the loader of each host takes its rows; its workers take batches in turn
      own = slice(host * ROWS, (host + 1) * ROWS)
      seen |= {(k % WORKERS, host, int(place + epoch * len(source))) for place, epoch in zip(plan.records[own], plan.epochs[own])}
      places.update((int(place), int(epoch)) for place, epoch in zip(plan.records[own], plan.epochs[own]))
    k += 1
  numbers = [number for *_, number in seen]
  assert len(set(numbers)) == len(numbers) == k * PROCESSES * ROWS and max(places.values()) == 1, "A picture was read twice."
  assert all(places[slot, epoch] for slot in range(len(source)) for epoch in range(EPOCHS)), "A picture of an epoch was missed."
  far = [int(place + epoch * len(source)) for k in FAR_BATCHES for plan in (mixture.plan(k),) for place, epoch in zip(plan.records, plan.epochs)]
  assert not set(far) & set(numbers) and len(set(far)) == len(far), "A picture far on was read before."
  some = [*numbers[:4], *far[:2], *far[-2:]]
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    pickled = pickle.dumps(parts)
    assert list(pool.map(_drawn, [pickled] * len(some), some[::-1])) == [_drawn(pickled, number) for number in some[::-1]], "Another process differs."
  return (f"{k} batches of {PROCESSES} processes with {WORKERS} workers: {len(numbers)} pictures of {len(source)} slots, none twice, none missed in "
          f"{EPOCHS} epochs; batches {', '.join(map(str, FAR_BATCHES))} hold others, up to number {max(far)}; another process draws the same")


def _drawn(parts: bytes, number: int) -> str:
  record = WithEdits(*pickle.loads(parts))[number]
  return hashlib.sha256(record["image"] + b"".join(record["sources"]) + record["attributes"]).hexdigest()


def need(num: int) -> Iterator[str]:
  """Yields in a sentence for each of `RUNS` how many pictures a second it asks for, and how many cores of a host draw them."""
  for name, base_px, batch, step_s, hosts in RUNS:
    source = RenderedText(Settings(base_px=base_px), "train", 2**20)
    for number in range(num):
      source.record(number)
    begin = time.process_time()
    for number in range(num, 2 * num):
      source.record(number)
    rate, asked = num / (time.process_time() - begin), SHARE * batch / step_s
    yield (f"{name}: {SHARE:.0%} of its batches are {asked:.1f} pictures a second of the pod, {asked / hosts:.2f} of each of {hosts} hosts; a core "
           f"draws {rate:.0f}, so {asked / hosts / rate:.1%} of one core of each")


# ---- what is read, and what others draw -----------------------------------------------------------------


def read_back(base_px: int, code: str, num: int, kind: str) -> str:
  """What OCR reads of pictures of one language."""
  source, errors, characters, right = source_of(base_px, [code], ("1:1",), kind), 0, 0, 0
  for number in range(num):
    record = source.record(number)
    lines = [line["text"] for block in RenderedText.truth(record)["blocks"] for line in block["lines"]]  # a break is a space on both sides
    score = score_text(lines, [line.text for line in ocr.read(record["image"])])
    errors, characters, right = errors + score["errors"], characters + score["characters"], right + (score["errors"] == 0)
  return f"{code} at {base_px} px: {1 - errors / characters:.2%} of {characters} characters, {right} of {num} pictures without an edit"


def beside_pango(code: str, num: int) -> str:
  """How far ink boxes are from those of pango."""
  language, rng = languages.load(code), np.random.default_rng(0)
  fit = [one for one in typefaces(find_faces(), language) if "Noto" in one.main.family and not one.main.is_italic]
  texts = [*language.sentences, *language.headings, *language.words]
  worst, far = 0, 0
  for _ in range(num):
    face, text = fit[rng.integers(len(fit))], texts[rng.integers(len(texts))]
    style = layout.Style(face, language, 1.5, breaks="never")
    found = layout.fit([text], style, 10**5, 10**3, (PANGO_PX, PANGO_PX + 1e-3)).moved(MARGIN_PX, MARGIN_PX)
    own = _extent(drawing.coverage(found, (0, 0, int(found.ink[2]) + MARGIN_PX, int(found.ink[3]) + MARGIN_PX)))
    families = ",".join(dict.fromkeys(one.family for one in face.faces))  # else fontconfig chooses what sets a comma that a font lacks
    apart = max(abs(a - b) for a, b in zip(own, _pango(text, families, "Bold" if face.main.is_bold else "", code)))
    worst, far = max(worst, apart), far + (apart > AGREE_PX)
  return f"{code}: {num - far} of {num} strings within {AGREE_PX} px, the furthest {worst} px apart"


def _pango(text: str, families: str, weight: str, code: str) -> tuple[int, int]:
  """(width, height) in px of the ink that pango-view draws."""
  with tempfile.NamedTemporaryFile(suffix=".png") as file:
    subprocess.run(["pango-view", "-q", f"--output={file.name}", f"--font={families} {weight} {PANGO_PX}px", f"--margin={MARGIN_PX}",
                    "--hinting=none", "--hint-metrics=off", "--subpixel-positions", "--antialias=gray", f"--language={code}", f"--text={text}"],
                   check=True, stdin=subprocess.DEVNULL)
    return _extent(255 - np.asarray(Image.open(file.name).convert("L")))


def _extent(ink: np.ndarray) -> tuple[int, int]:
  rows, columns = np.nonzero(ink > 5)  # of 255
  return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


def sheet(base_px: int, codes: Sequence[str], columns: int, kind: str, layout_name: str) -> Image.Image:
  """Pictures beside each other, a row for each language, templates that were there a while ago only."""
  edge, rows, known = ((2, 2), (2, 2), (0, 0)), [], []
  for row, code in enumerate(codes):
    source, images = source_of(base_px, [code], ("1:1",), kind, layout_name), []
    for number in range(row * columns, 2**20):
      record = source.record(number)
      layout = RenderedText.truth(record)["layout"]
      if kind != "complex" or layout_name or layout not in known[-REMEMBERED:]:
        known.append(layout)
        images.append(np.pad(record["image"], edge, constant_values=128))
      if len(images) == columns:
        break
    rows.append(np.hstack(images))
  return Image.fromarray(np.vstack(rows))


def edit_sheet(base_px: int, codes: Sequence[str], columns: int, kind: str) -> Image.Image:
  """Edits of a kind: source, target, and the instructions in English and in the language; a row for each language, `columns` edits in it."""
  rows = []
  for code in codes:
    settings = Settings(base_px=base_px, languages=dict.fromkeys([code, *(one for one in codes if one != code)], 1.0), ratios=("1:1",),
                        edit_kinds={kind: 1.0}, pictures=flags.FLAGS.pictures)
    source, found = RenderedText(settings, "train", 2**20, are_edits=True), []
    faces = next(one for one in typefaces(find_faces(), languages.load(code)) if one.main.style == "Regular")
    for number in itertools.count(1000 * codes.index(code)):
      if len(found) == columns:
        break
      if source.slot(number).language == code:
        record = source.record(number)
        panel = Image.new("RGB", (base_px * 2 // 3, record["height"]), "white")
        width, height = panel.width - 16, panel.height // 2 - 16
        for said, of, top in ((record["captions"][0], "en", 8), (record["captions"][-1], code, 8 + panel.height // 2)):
          text = layout.fit([said], layout.Style(faces, languages.load(of), 1.4), width, height, (4, base_px / 18))
          drawing.draw_on(panel, text.moved(8, top), (0, 0, 0))
        found.append(np.hstack([np.pad(one, ((2, 2), (2, 2), (0, 0)), constant_values=128) for one in (*record["sources"], record["image"], panel)]))
    rows.append(np.hstack(found))
  return Image.fromarray(np.vstack(rows))


def main(_: Sequence[str]) -> None:
  """The command; see the module docstring."""
  f = flags.FLAGS
  codes = f.languages or languages.codes()
  if f.measure == "speed":
    print(speed(f.base_px, codes, f.num, f.kind))
  elif f.measure == "memory":
    for line in memory(f.base_px, codes, f.num, f.kind):
      print(line, flush=True)
  elif f.measure == "need":
    for line in need(f.num):
      print(line, flush=True)
  elif f.measure == "tokens":
    print(count_tokens(f.base_px, codes, f.num, f.kind, f.tokenizer))
  elif f.measure == "pod":
    print(count_pod(f.num))
  elif f.measure == "nasty":
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(survey(f.num, codes).items())))
  elif f.measure in ("sheet", "edits"):
    drawn = edit_sheet(f.base_px, codes, f.columns, f.kind) if f.measure == "edits" else sheet(f.base_px, codes, f.columns, f.kind, f.layout)
    (drawn.quantize(200) if f.out.endswith(".png") else drawn).save(f.out, optimize=True)
  else:
    for code in codes:
      print(read_back(f.base_px, code, f.num, f.kind) if f.measure == "ocr" else beside_pango(code, f.num), flush=True)


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_enum("measure", "speed", ["speed", "memory", "tokens", "nasty", "pod", "need", "ocr", "pango", "sheet", "edits"], "What is measured.")
  flags.DEFINE_integer("base_px", 256, "About the square root of a picture's area.", lower_bound=64)
  flags.DEFINE_integer("num", 200, "Pictures of a round, or strings of a language.", lower_bound=1)
  flags.DEFINE_integer("columns", 6, "Of a sheet: pictures or edits of each language.", lower_bound=1)
  flags.DEFINE_list("languages", [], "Their codes; all where none is given.")
  flags.DEFINE_enum("kind", "pure", KINDS, "The kind of pictures, of speed, memory, tokens, ocr, edits and a sheet.")
  flags.DEFINE_string("pictures", "", "A folder of pictures for the compositional kind.")
  flags.DEFINE_string("tokenizer", "", "Of tokens: a tokenizer.json, such as that of a published model's processor; empty to train one.")
  flags.DEFINE_string("layout", "", "Of a sheet: one layout, or template, in place of all.")
  flags.DEFINE_string("out", "sheet.png", "Of a sheet, of edits too: its file.")


if __name__ == "__main__":
  cli.run(main, define_flags)
