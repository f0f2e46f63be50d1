"""Adaptive-compute Transformers: modules and operations for plain torch, and a plug-in for fairseq.

Importing this package, ``fairseq_adaptive.modules`` or ``fairseq_adaptive.ops`` patches nothing, hooks nothing and
needs torch alone. What fairseq needs comes with :mod:`fairseq_adaptive.plugin`.
"""

import os

__version__ = "0.1.0"


class _Folders(list):
    """The folder of this package; imports the plug-in when fairseq asks whether its ``--user-dir`` is in here.

    fairseq (``fairseq.utils.import_user_module``) imports ``tasks/`` and ``models/`` of a user directory, and with them
    the plug-in, only where the package was not imported before. Where it was, all that fairseq does is to ask
    ``user_dir in package.__path__``: a program that has used our modules would then train with stock fairseq, without
    our models. fairseq compares strings, too, and refuses its own spelling of an installed package's folder,
    ``site-packages/fairseq/../fairseq_adaptive``.
    """

    def __contains__(self, folder):
        found = os.path.realpath(folder) in map(os.path.realpath, self)
        if found:
            import fairseq_adaptive.plugin  # noqa: F401
        return found


__path__ = _Folders(__path__)
