"""Evaluation: any model behind one interface, measured by one set of protocols, with a report.

encoders        dual encoders and sentence-transformers models as an `Encoder`
protocols       retrieval, zero-shot, linear probe, STS, pair classification: an `Encoder` and rows in, a `Result` out
rows, labels    usable rows and their classes; the others are skipped, counted and named
retrieval       ranks, both definitions of recall, nDCG, reciprocal rank
relevance       right answers if rows share a text or an image
modality_gap, compression, failures    further measurements of image-text retrieval
suites          `EvaluationSuite`: data sets and their protocols; `suites/` holds those that come with Bifocal
task_rows       the rows of a suite's task, read once for all models
mteb_tasks      MTEB through the mteb library
arguments       checks of what `bifocal evaluate` is asked for, without torch
runner          `run_evaluation`, which `bifocal evaluate` calls, and cached results
report, report_plots    `report.html`, and the numbers of `results.json`
callback        evaluation while a model trains
metrics/        recall@k and nDCG@k for the `evaluate` library
"""
