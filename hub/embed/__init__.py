"""`bifocal embed`: a source in, a table of vectors out, in one process or on many machines.

- `settings`: how a run embeds, recorded with its parts.
- `table`: the columns of the table, and a part of it.
- `parts`: where parts are written: Parquet files in a folder or an object store.
- `task`: reads one split of a source and writes its parts.
- `run`: the tasks of a run, and what it did.
"""
