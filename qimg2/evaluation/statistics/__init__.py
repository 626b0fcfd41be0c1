"""Statistics of scores, comparisons and votes: each result is a number with its interval, or says why it has none.
"""
