"""Hydra looks into this folder of every installed package before it reads a configuration.

So ``fairseq-hydra-train`` knows our models, criterions and tasks when it composes one (``model=shared_transformer_lm``, values
that a task takes from its criterion); ``common.user_dir`` alone is imported after that. Other programs import nothing.
"""

import sys
from pathlib import Path

if Path(sys.argv[0]).name == "fairseq-hydra-train":
    import fairseq_adaptive.plugin  # noqa: F401
