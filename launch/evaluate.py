"""Evaluates a model, or pictures that something else made: draws the prompts of suites, scores the pictures, states each figure with its interval.

  python -m launch.evaluate --workdir=runs/quickstart                                   the suites of its config, into evaluation.json
  python -m launch.evaluate --workdir=runs/quickstart --stage=sft --suite=glyphs,glyph_edits --seeds=0,1,2,3 --out=eval/sft
  python -m launch.evaluate --pretrained=DIR --suite=text:languages=en+zh --num_prompts=50 --out=eval/published
  python -m launch.evaluate --images=FOLDER --suite=text --out=eval/theirs              FOLDER/manifest.jsonl has a line per picture
  python -m launch.evaluate --out=eval/sft --compare=eval/high_resolution               both are finished
"""

import re

from absl import flags

from launch import cli
from qimg2.runtime import processes
from qimg2.runtime.evaluating import comparing, summary
from qimg2.runtime.evaluating.asked import Asked, evaluate_images, evaluate_model
from qimg2.runtime.evaluating.folder import Folder
from qimg2.runtime.evaluating.job import Share
from qimg2.runtime.evaluating.of_run import describe, evaluate
from qimg2.runtime.evaluating.registry import parse_suites
from qimg2.runtime.rehearsal.drawing import Drawer
from qimg2.runtime.run import load_run
from qimg2.runtime.weights import DEPLOYED

ASKED = ("out", "compare", "num_prompts", "part", "num_workers")
MODEL = ("stage", "step", "average", "transformer", "lora", "dtype", "num_steps", "guidance", "output_resolution", "batch_size", "offload", "seeds")


def define_flags() -> None:
  """The flags of this launcher."""
  flags.DEFINE_string("workdir", "", "Folder of the run, as given to launch.train.")
  flags.DEFINE_string("pretrained", "", "Folder in the published layout, in place of --workdir.")
  flags.DEFINE_string("transformer", "", "File with the generator's weights, .safetensors or .gguf, in place of those of --pretrained.")
  flags.DEFINE_multi_string("lora", [], "A LoRA on the generator, FILE or FILE,SCALE; repeat the flag for more.")
  flags.DEFINE_string("images", "", "Folder of pictures with a manifest.jsonl, in place of a model: nothing is drawn.")
  flags.DEFINE_string("stage", "", "Stage to evaluate; the last trained one when empty.")
  cli.define_step_flag()
  flags.DEFINE_string("average", DEPLOYED, "Averaged weights to use, such as ema, or none: the weights themselves. Default: what the method deploys.")
  flags.DEFINE_multi_string("suite", [], "Suites, with commas between; or one with settings, such as text:languages=en+zh,num_prompts=50. Repeat the "
                            "flag for more. "
                            "Default: those of the run's config, into its evaluation.json.")
  flags.DEFINE_string("out", "", "Folder for pictures, scores.jsonl, summary.json and report.html; the same command goes on with it.")
  flags.DEFINE_integer("num_prompts", None, "Prompts of each suite that does not say num_prompts; default: all, or the suite's own number.",
                       lower_bound=1)
  flags.DEFINE_list("seeds", ["0"], "Seeds of the noise: each prompt is drawn with each. With --images: those that each prompt should have; default: "
                    "all that are there.")
  flags.DEFINE_string("compare", "", "Another --out with the same prompts: prints the differences with intervals and p-values.")
  flags.DEFINE_integer("num_steps", 0, "Sampling steps; 0 takes the run's, or 40.", lower_bound=0)
  flags.DEFINE_float("guidance", None, "Scale of classifier-free guidance; at most 1 is none. Default: the run's, or 1.", lower_bound=0)
  flags.DEFINE_integer("output_resolution", 0, "With --pretrained, side of the square whose area each picture takes; 0: the sizes of the suite.",
                       lower_bound=0)
  flags.DEFINE_integer("batch_size", 0, "Pictures at a time; 0: at most 16.", lower_bound=0)
  flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type of the networks; default: the run's, or that of a folder's files.")
  flags.DEFINE_bool("offload", False, "Keep only the network that runs on the device, and the weights of the others in host memory.")
  flags.DEFINE_string("part", "0/1", "I/N: do part I, counted from 0, of N, which are jobs of their own with one --out. The last one writes "
                      "the summary.")
  flags.DEFINE_integer("num_workers", 0, "Processes that score on the host; 0: one less than there are cores.", lower_bound=0)
  cli.define_process_flags()


def main(_) -> None:
  """Evaluates as the flags say and prints the result."""
  args = flags.FLAGS
  if sum(map(bool, (args.workdir, args.pretrained, args.images))) > 1:
    raise ValueError("Give one of --workdir, --pretrained and --images.")
  if args.workdir and not args.suite:
    _refuse([name for name in (*ASKED, *MODEL[2:]) if args[name].present], "has no effect without --suite: name one")
    result = evaluate(load_run(args.workdir), args.stage, step=args.step)
    if processes.is_first():
      print(describe(result))
    return
  if not args.out:
    raise ValueError("Give --out, a folder for what is drawn and found, and --suite; or --workdir alone for the suites of its config.")
  if args.workdir or args.pretrained or args.images:
    found = _evaluate(args)
    if found is None:
      if processes.is_first():
        print(f"Part {args.part} is done, and others are not: the last of them writes {args.out}/summary.json.")
      return
    if processes.is_first():
      print(f"{summary.describe(found)}\nReport: {args.out}/report.html")
  elif not args.compare:
    raise ValueError("Give --workdir, --pretrained or --images: what is to be evaluated.")
  if args.compare and processes.is_first():
    print(comparing.describe(comparing.compare(Folder(args.out), Folder(args.compare))))


def _evaluate(args: flags.FlagValues) -> dict | None:
  """The summary, or None while other parts are not done."""
  if not args.suite:
    raise ValueError("Give --suite, such as --suite=text: what is to be drawn or scored.")
  suites, share, seeds = parse_suites(args.suite, args.num_prompts), _share(args.part), _seeds(args.seeds)
  if args.images:
    _refuse([name for name in MODEL if args[name].present and name != "seeds"], "is for a model: leave it out with --images")
    return evaluate_images(args.out, args.images, suites, share, args.num_workers, seeds if args["seeds"].present else ())
  if args.pretrained:
    _refuse([name for name in ("stage", "step", "average") if args[name].present], "chooses among a run's weights: leave it out with --pretrained")
  else:
    _refuse([name for name in ("transformer", "output_resolution") if args[name].present], "goes with --pretrained: leave it out with --workdir")
  drawer = Drawer(args.pretrained, args.workdir, args.stage, args.average, args.dtype, args.transformer, args.step,
                  tuple(args.lora))
  asked = Asked(suites, seeds, args.num_steps, args.guidance, args.output_resolution, args.batch_size, args.offload)
  return evaluate_model(args.out, drawer, asked, share, args.num_workers)


def _refuse(names: list[str], why: str) -> None:
  if names:
    raise ValueError(f"--{names[0]} {why}.")


def _seeds(texts: list[str]) -> tuple[int, ...]:
  """The seeds that --seeds lists.

  Raises:
    ValueError: one that is no whole number from 0, or twice.
  """
  if not texts or not all(re.fullmatch(r"\s*[0-9]+\s*", text) and int(text) < 2**31 for text in texts):
    raise ValueError(f"--seeds={','.join(texts)} is not understood: give whole numbers from 0, such as 0,1,2,3.")
  seeds = tuple(map(int, texts))
  if len(set(seeds)) < len(seeds):
    raise ValueError(f"--seeds={','.join(texts)} has one twice: it would count as two pictures.")
  return seeds


def _share(text: str) -> Share:
  found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
  if not found or not int(found[1]) < int(found[2]):
    raise ValueError(f"--part={text} is not understood: give I/N with I from 0 to N - 1, such as 3/64.")
  return Share(int(found[1]), int(found[2]))


if __name__ == "__main__":
  cli.run(cli.together(main), define_flags)
