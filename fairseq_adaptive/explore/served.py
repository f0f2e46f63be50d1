"""The :class:`~fairseq_adaptive.explore.explorer.Explorer` that the page of this process shows."""

explorer = None
