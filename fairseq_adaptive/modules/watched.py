"""The last call of a model by code that cannot be changed, such as a stock criterion."""


class Watched:
    """Stands for a model and remembers its last call.

    Args:
        model: a fairseq model

    Attributes:
        call: positional and named arguments of the last call
        output: the first of what it returned
    """

    needs_scores = True  # a criterion must not ask the model for features instead

    def __init__(self, model):
        self._model, self.call, self.output = model, None, None

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *args, **kwargs):
        self.call, output = (args, kwargs), self._model(*args, **kwargs)
        self.output = output[0]
        return output
