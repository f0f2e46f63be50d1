"""What tokens of a stack are seen by others, as its policies have it."""


class Visibility:
    """Of a stack with ``halting``, ``router``, ``halting_kv`` and ``router_kv``."""

    @property
    def adaptive(self) -> bool:
        """Whether tokens are left out or halt."""
        return self.halting is not None or self.router is not None

    @property
    def merges(self) -> bool:
        """Whether a router puts tokens together."""
        return self.router is not None and self.router.merges

    @property
    def hides(self) -> bool:
        """Whether some tokens are invisible at some depths."""
        return (self.router is not None and self.router_kv == "active") or (
            self.halting is not None and self.halting_kv == "active"
        )

    @property
    def kv(self) -> str:
        """Which keys and values are read where tokens are seen: ``recompute``, ``keep`` or ``first``."""
        answers = self.router_kv, self.halting_kv
        return "first" if "first" in answers else "keep" if "keep" in answers else "recompute"

    @property
    def sees_others(self) -> bool:
        """Whether tokens see some that are not computed."""
        return (self.halting is not None and self.halting_kv != "active") or (
            self.router is not None and self.router_kv != "active"
        )
