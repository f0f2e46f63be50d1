"""Draws how an attention search came about: the probability of each kind of each block over the updates, the temperature,
and the layout that was found.

Reads the log of the search, or its --tensorboard-logdir, without the checkpoint.
"""

import logging

from fairseq_adaptive.ranges import Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "source", help="the log of a search with --criterion architecture_entropy_loss, or its --tensorboard-logdir"
    )
    parser.add_argument("--output", metavar="PNG", help="the map; must not exist")
    parser.add_argument("--animation", metavar="GIF", help="the map as it grows; must not exist")
    args = parser.parse_args(argv)
    if not args.output and not args.animation:
        parser.error("name what to draw: --output, --animation or both")

    from fairseq_adaptive.report.pictures import require_animation, require_picture
    from fairseq_adaptive.report.search_map import animate_course, plot_course, read_course

    logging.disable(logging.INFO)
    if args.output:
        require_picture(args.output)
    if args.animation:
        require_animation(args.animation)
    course = read_course(args.source)
    print(f"{len(course.updates)} moments up to {course.updates[-1]} updates: --layout {course.layout()}")
    for draw, path in ((plot_course, args.output), (animate_course, args.animation)):
        if path:
            draw(course, path)
            print("wrote", path)
