"""All flags of what this package registers, as text: ``python tests/frozen_flags.py`` writes them to frozen_flags.txt.

A new flag, another default or another range is a decision: run that, and let the difference be seen in the commit.
"""

from pathlib import Path

from fairseq.models import ARCH_MODEL_NAME_REGISTRY

from fairseq_adaptive.report.flags import flags_of, ours, preset_says, presets

FILE = Path(__file__).with_name("frozen_flags.txt")
COMMAND = "python tests/frozen_flags.py"


def frozen():
    """The text of the file: classes with their flags, then presets with what they say of them."""
    lines = []
    for kind, name, owner in ours():
        lines += [f"{kind} {name}", *(f"  {each.name}  {each.takes}  = {each.default}" for each in flags_of(owner)), ""]
    for name in presets():
        says = [f"  {key} = {value}" for key, value in sorted(preset_says(name).items())]
        lines += [f"preset {name} of {ARCH_MODEL_NAME_REGISTRY[name]}", *says, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(frozen(), encoding="utf-8")
    print(f"wrote {FILE}")
