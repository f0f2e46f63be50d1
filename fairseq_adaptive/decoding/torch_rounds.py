class TorchRounds:
    @classmethod
    def of(cls, generator, net_input):
        return None
