"""Measure the method and the baselines on concepts that no training has seen.

edits.py     which concepts and edits, and their true renderings
methods.py   what is compared: the tuning encoder, its variants, the baselines
measures.py  identity, prompt fidelity, distance to the truth, words, diversity
run.py       `dte evaluate`: one table of measures per run, with resume
report.py    `dte report`: tables with intervals and figures
blending.py  experiment 2: the settings of the dual path on the same tuned concepts
steps.py     how many tuning steps are enough, per group of concepts
"""
