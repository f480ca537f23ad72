"""Models on their way to and from the Hub. This module imports nothing; import from the modules below.

- Convert published weights: `convert` (`bifocal convert`), with `weights` (reads files), `weight_layouts` (maps names),
  `source_config` (derives the configuration) and `families` (recognises what cannot be converted).
- Export a model: `export` (`export_model`: weights, code, sentence-transformers' files and card), with `card`,
  `card_results`, `sentence_files` and `other_families` (CLIP and SigLIP).
- Release a run: `export_run` (`bifocal export`) gathers what a run's folder says, and `release` writes it with ONNX
  files (`onnx`) and examples (`sample_images`). `check` (`bifocal export --check`) loads the result in every way, in a
  process of its own (`load_in_subprocess`).
- Publish: `push` (`bifocal push`).
- Search: `indexing` (`bifocal index`: from a source to an index), `search/` (index, queries and page, the code that a
  Space contains) and `space` (`bifocal serve --space`).
"""
