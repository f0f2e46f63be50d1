"""Shows what is installed, what runs where, and why: versions, devices, kernels, patches, models and architectures.

Exit status 1 where fairseq cannot be imported, else 0.
"""

import sys

from fairseq_adaptive.ranges import Parser


def main(argv=None, prog=None):
    Parser(prog=prog, description=__doc__).parse_args(argv)

    from fairseq_adaptive import info

    sys.exit(info.main())
