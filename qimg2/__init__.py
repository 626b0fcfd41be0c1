"""qimg2: training of Qwen-Image-2.0-like image models in JAX.

Reading order:
  params, sharding, layers        a weight is declared once; the mesh; what all networks share
  attention                       who sees whom, and a back end for each kind of device
  models                          mmdit (the generator), qwen3_vl (the condition encoder), vae (pixels <-> latents)
  conditioning                    from a batch to latents, text states and the layout of the joint sequence
  flow, sampler                   the path between data and noise; the ODE from noise to data
  algorithms                      what a stage minimises: flow_matching, reconstruction
  optim, state, checkpoint        the update, what it changes, and where that is kept
  metrics, evaluate, trainer      numbers, deterministic validation, the one loop
  flops, hlo, roofline            operations a step asks for; what a compiled one does; the fastest it could be on a chip
  pretrained, names               published tensors <-> our weights, tensor by tensor, and their names
  pipeline_folder, export         a whole published folder: read, and written so that diffusers loads it

Letters, one meaning each everywhere: B batch, N image tokens, M text tokens, S joint sequence, D width, H heads, G key/value heads, K head
dim, F MLP width, C channels, L layers, T sampling steps. Time t is in [0, 1] and 1 is noise.
"""
