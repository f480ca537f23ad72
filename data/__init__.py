"""The data room: from a source that a recipe or a command names to rows of one kind.

It knows nothing of training or evaluation.

- What a user sets: `source` (and `schema`, which validates it), `filters`, `kinds`, `corpora`, `mixtures`.
- From a path to rows: `paths` (patterns, addresses, allowed roots), `locate` (files, reader, layout), `loading` (a
  data set, a stream, or the kind of its rows).
- Readers of one file: `readers` (Parquet, Arrow, image folders), `text_files` (JSON, JSONL), `delimited` (CSV, TSV),
  `tar`, `beir`, `nli`.
- From raw rows to rows of a kind: `columns`, `labels`, `normalize`; `row_names` for messages.
- Many rows: `shards` (streams that resume), `splits` (the files of a source as sources), `tables` (cached data sets),
  `skips` (skipped rows), `consistency`, `vector_cache` (files of vectors, with which a killed run resumes),
  `signatures` (what is compared of images and texts), `similar_pairs` of them, `near_duplicates`, `leakage` (training
  rows in an evaluation set).
- Images: `images` (from a cell to pixel values), `image_errors` (why one cannot be read), `image_files` (in folders),
  `image_decoding` (views of data sets).
- `parallel` runs tasks in this process, in several (`worker_processes`), or on a Ray cluster (`ray_actors`).
- Made from sources: `inspection` and `inspection_page`, `leakage_report`, `captioning`, `clean_copy` (of `clean_parts`,
  whose rows `part_comparison` compares); `symbols` and `symbol_texts` make a data set that needs no download.
"""
