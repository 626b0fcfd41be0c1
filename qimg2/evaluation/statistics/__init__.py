"""Statistics of scores, comparisons and votes: each result is a number with its interval, or says why it has none.

  sums        scores of pictures summed by prompt; the form of a result
  intervals   of a figure: Wilson, Wilson over prompts, t over prompts, and `figure`, which chooses
  bootstrap   percentile and BCa intervals over prompts
  paired      two runs on the same prompts: `compare`, McNemar, sign flip, sign test, net win rate, Holm
  ratings     Bradley-Terry ratings of models from votes, with ties; ranks
  agreement   Krippendorff's alpha of raters
  sizes       how many prompts or votes a wanted interval or power needs

Needs numpy and scipy only. docs/evaluation_statistics.md says which to use, and how often each interval covers the truth.
"""

from qimg2.evaluation.statistics.intervals import figure
from qimg2.evaluation.statistics.paired import Comparison, compare, holm, preference
from qimg2.evaluation.statistics.sums import Estimate, Scores

__all__ = ["Comparison", "Estimate", "Scores", "compare", "figure", "holm", "preference"]
