"""qimg2: training of Qwen-Image-2.0-like image models in JAX.

Reading order:
  params, sharding, layers    a weight is declared once; the mesh; what all networks share
  adapters                    a low-rank adapter (LoRA) beside a frozen weight
  batch                       the contract of a batch: keys, shapes, types
  attention/                  who sees whom, and a file for each back end
  models/                     mmdit (the generator), qwen3_vl (the condition encoder), vae (pixels <-> latents), lpips (how far pictures are)
  layout, networks            the joint sequence of prompt, images and target; from a batch to latents, text states and a velocity
  flow, sampler, sde          the path between data and noise; the ODE from noise to data; SDEs whose steps have a density
  algorithms/                 what a stage minimises: flow_matching, reconstruction; what learns from pairs, teachers and rewards; any with an adapter
  training/                   the update, what it changes, where that is kept, numbers, deterministic validation, the one loop
  published/                  published tensors <-> our weights, a whole folder read and written
  analysis/                   operations that a step asks for; what a compiled one does; the fastest it could be on a chip
  evaluation/                 evaluation suites: the contract, metrics of pictures and texts, a judge, statistics
  rewards/                    what a picture is worth: pure functions of it and of what was asked for, and the processes that compute them
  runtime/                    config, data and networks joined: what the launchers and notebooks call
  flax_module                 the generator as a linen module

Letters, one meaning each everywhere: B batch, N image tokens, M text tokens, S joint sequence, D width, H heads, G key/value heads, K head
dim, F MLP width, C channels, L layers, T sampling steps. Time t is in [0, 1] and 1 is noise.
"""
