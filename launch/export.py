"""Writes the networks of a trained run as a folder that diffusers loads as it is, the generator alone as one file, or the adapter of one. What an
adapter changes is merged into the first two.

  python -m launch.export --workdir=runs/quickstart --out=runs/quickstart_pipeline
  python -m launch.export --workdir=runs/quickstart --transformer_only --dtype=float32 --out=runs/transformer.safetensors
  python -m launch.export --workdir=runs/quickstart --comfyui --out=runs/comfyui.safetensors
  python -m launch.export --workdir=runs/mine --lora --out=runs/mine.safetensors
"""


from absl import flags

from launch import cli
from qimg2.published.export import FILE_DTYPES
from qimg2.runtime.exporting import export
from qimg2.runtime.run import load_run
from qimg2.runtime.weights import DEPLOYED


def define_flags() -> None:
  """The flags of this launcher."""
  flags.DEFINE_string("workdir", None, "Folder of the run, as given to launch.train.", required=True)
  flags.DEFINE_string("out", None, "Folder to write, or with --transformer_only, --comfyui or --lora a .safetensors file; must not exist.",
                      required=True)
  flags.DEFINE_string("stage", "", "Stage whose generator to write; the last trained one when empty.")
  cli.define_step_flag()
  flags.DEFINE_string("average", DEPLOYED, "Averaged weights to use, such as ema, or none: the weights themselves. Default: what the method deploys.")
  flags.DEFINE_enum("dtype", "bfloat16", tuple(FILE_DTYPES), "Type of the weights in the files.")
  flags.DEFINE_float("max_shard_bytes", 5e9, "Largest size of one file's tensors in bytes; a network that needs more gets several files.",
                     lower_bound=1)
  flags.DEFINE_bool("transformer_only", False, "Write the generator alone, as one file.")
  flags.DEFINE_bool("comfyui", False, "Write the generator alone, as one file in the form that ComfyUI loads; with --lora its adapter.")
  flags.DEFINE_bool("lora", False, "Write the adapter alone, as a LoRA file that diffusers and ComfyUI load.")


def main(_) -> None:
  """Exports as the flags say."""
  args = flags.FLAGS
  out = export(load_run(args.workdir), args.out, args.stage, args.average, args.dtype, args.max_shard_bytes, args.transformer_only,
               args.comfyui, args.step, args.lora)
  print(f"Written: {out}")


if __name__ == "__main__":
  cli.run(main, define_flags)
