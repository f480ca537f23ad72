"""Models on their way to and from the Hub. This module imports nothing; import from the modules below.

- Convert published weights (`bifocal convert`): `convert_towers` takes dual encoders and two towers of transformers,
  with `accounting` (finds every tensor again) and `source_card` (names, licences). `convert` takes jina-clip, JinaBERT
  and EVA02, with `weight_layouts` (maps names), `lora` (merges an adapter), `source_config` (derives the configuration)
  and `families` (recognises what cannot be converted). `checkpoint_files`, `weights` and
  `source_files` read files.
- Export a model: `export` (`export_model`: weights, code, sentence-transformers' files and card), with `card`,
  `tower_facts` (what it says of each tower), `card_results` and `sentence_files`.
- Release a run (`bifocal export`): `export_arguments` checks what is asked for, `export_run` gathers what a run's
  folder says, and `release` writes it with ONNX files (`onnx`) and examples (`sample_images`). `check` (`bifocal
  export --check`) loads the result in every way, in a process of its own (`load_in_subprocess`).
- Publish: `push` (`bifocal push`).
- Search: `indexing` (`bifocal index`: from a source to an index), `search/` (index, queries and page, the code that a
  Space contains), `space` (`bifocal serve --space`), whose arguments `space_arguments` checks, and `static_site/`
  (`bifocal serve --static`, a page without a server).
"""
