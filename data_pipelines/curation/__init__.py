"""Raw pictures to records: sources, the funnel of operators, and the Beam pipeline that runs both.

Reading order: sample (what flows), sources (where it comes from), operators (what is kept), funnel (one unit of work), pipeline (all of them),
report (what was dropped, and why).
Training imports nothing of this package; what only it needs is in requirements-data.txt.
"""
