"""Measure the method and the baselines on concepts that no training has seen.

A row of `dte evaluate`, in the order in which it comes about:
edits.py            which concepts and edits, and their true renderings
specifications.py   what is compared, as written: "dte@alpha_blend=1:12"
methods.py          concepts by specification: the tuning encoder, its variants, the baselines
trials.py           a method's pictures of one concept, and the rows that the judges make of them
measures.py         identity, prompt fidelity, distance to the truth, words, diversity, losses
run.py              the loop over methods and concepts, with resume
records.py          the row and the table; what a file says of how it was made
report.py           `dte report`: tables with intervals
figures.py          and figures

Experiments of their own:
blending.py         the settings of the dual path on the same tuned concepts
regularisation.py   v* tuned with the contrastive term and without; v_star_paths.py, where it went
steps.py            how many tuning steps are enough, per group of concepts
encoders.py         encoders that differ in one thing
base_model.py       the small base model; base_model_curve.py, over its training
"""
