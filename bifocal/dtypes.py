"""The choices of dtype that commands and recipes take. Importing it needs no torch."""

from typing import Literal

# As `DTYPE_CHOICES` of `modeling.dtype_bifocal`, which may not import this file.
DtypeChoice = Literal["model", "auto", "float32", "bfloat16", "float16"]
