"""Runs evaluation suites (`qimg2.evaluation`) on models, and on pictures that something else made.

  registry    the suites by name            drawing    which program draws which task
  asked       what launch.evaluate does     job        draws, scores, goes on after a kill
  of_run      a run's own evaluation        folder     the files of an evaluation
  embedded    suites of embedded data       scoring    scores, in processes or on the device
  summary     figures with intervals        page       report.html
  comparing   two evaluations
"""
