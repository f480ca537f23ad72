"""Collections that outgrow one machine: tables of vectors in LanceDB, in a folder or in an object store.

LanceDB, because its tables are Arrow as ours are, it runs in this process without a server, and the same client works
on object stores (`s3://`, `gs://`, `az://`) and its cloud (`db://`), where vectors stay on disk.

- `database`: opens a database; says in one sentence what is wrong with one.
- `parts`: writes a table part by part, from any number of processes.
- `indexes`: builds the indexes of a table, and the sample that makes scores of images and texts comparable.
- `search`: searches a table by vectors, or by vectors and words.
- `export`: writes the items of a local index to a database.
"""
