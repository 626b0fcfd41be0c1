"""Sends pictures through the VAE of a run or of a published folder, and says how much of them comes back: PSNR, SSIM, LPIPS, text.

  python -m launch.reconstruct --workdir=runs/quickstart --dataset=glyphs --data_dir=runs/data --out=eval/vae
  python -m launch.reconstruct --pretrained=DIR --pictures=FOLDER --lpips=lpips_alex.safetensors --ocr --out=eval/vae
"""

import itertools
import json
import pathlib

from absl import flags

from launch import cli
from qimg2.places import write_file
from qimg2.runtime import processes
from qimg2.runtime import reconstruction as of_vae
from qimg2.runtime.evaluating.folder import lines, make_folder
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.run import load_run


def define_flags() -> None:
  """The flags of this launcher."""
  flags.DEFINE_string("workdir", "", "Folder of the run, as given to launch.train.")
  flags.DEFINE_string("pretrained", "", "Folder in the published layout, in place of --workdir.")
  flags.DEFINE_string("stage", "", "Stage whose VAE to take; the last trained one when empty.")
  cli.define_step_flag()
  flags.DEFINE_string("pictures", "", "Folder of pictures; those of a sub-folder are a kind of their own.")
  flags.DEFINE_string("dataset", "", "A prepared data set, in place of --pictures.")
  flags.DEFINE_string("data_dir", "runs/data", "Where --dataset is.")
  flags.DEFINE_string("split", "validation", "Split of --dataset.")
  flags.DEFINE_integer("num_pictures", 0, "How many of them, the first; 0: all.", lower_bound=0)
  flags.DEFINE_string("out", None, "Folder for scores.jsonl, a line per picture, and summary.json.", required=True)
  flags.DEFINE_string("lpips", "", "File of LPIPS' weights, see docs/evaluation_pictures.md; LPIPS is left out when empty.")
  flags.DEFINE_bool("ocr", False, "Read the texts of originals and reconstructions, and compare them (NED).")
  flags.DEFINE_integer("batch_size", 1, "Pictures at a time.", lower_bound=1)
  flags.DEFINE_integer("vae_tile", 0, "Side in px of the tiles in which the VAE reads and writes larger pictures, such as 256; 0: whole pictures.",
                       lower_bound=0)
  flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type of the VAE; default: the run's, or that of a folder's files.")
  cli.define_process_flags()


def main(_) -> None:
  """Reconstructs as the flags say, writes both files and prints the figures."""
  args = flags.FLAGS
  if bool(args.workdir) == bool(args.pretrained):
    raise ValueError("Give one of --workdir and --pretrained: whose VAE?")
  if bool(args.pictures) == bool(args.dataset):
    raise ValueError("Give one of --pictures and --dataset: which pictures?")
  out = pathlib.Path(args.out)
  make_folder(out)
  source = load_run(args.workdir, args.dtype) if args.workdir else Pretrained(args.pretrained, args.dtype)
  stage, weights = of_vae.vae_weights(source, args.stage, args.step)
  net, distance = of_vae.lpips_distance(args.lpips) if args.lpips else ("", None)
  pictures = of_vae.folder_pictures(args.pictures) if args.pictures else of_vae.record_pictures(args.data_dir, args.dataset, args.split)
  chosen = itertools.islice(pictures, args.num_pictures or None)
  rows = list(of_vae.reconstruct(source, weights, chosen, args.batch_size, args.vae_tile, distance, of_vae.read_text if args.ocr else None))
  result = {"workdir": args.workdir, "pretrained": args.pretrained, "stage": stage, "lpips": net, **of_vae.summary(rows)}
  if processes.is_first():
    write_file(out / "scores.jsonl", lines(sorted(rows, key=lambda row: row["task"])))
    write_file(out / "summary.json", json.dumps(result, indent=1, ensure_ascii=False))
    print(of_vae.in_words(result))


if __name__ == "__main__":
  cli.run(cli.together(main), define_flags)
