"""Everything that fairseq is to know of this package: patches first, then criterions, models, optimizers and tasks.

Imported when fairseq runs: by ``--user-dir fairseq_adaptive`` (see :class:`fairseq_adaptive._Folders`), by each of the
folders whose classes fairseq registers, by the command lines and the hub. A Python program that uses fairseq without
``--user-dir``, or has a ``--user-dir`` of its own, imports it to have our models::

    import fairseq_adaptive.plugin
"""

from fairseq_adaptive import compat, errors

errors.report_usage_errors(within="fairseq_cli")
if compat.apply():  # else fairseq cannot be imported, and fairseq_adaptive.info says why
    import fairseq_adaptive.criterions  # noqa: F401
    import fairseq_adaptive.models  # noqa: F401  registers models and architectures; needs the patches
    import fairseq_adaptive.optim  # noqa: F401
    import fairseq_adaptive.tasks  # noqa: F401
