"""What scripts and torchrun of tests start in the place of Python and of fairseq's commands; see :mod:`cli.commands`.

It hands its arguments, environment, folder and open files to the process that forks (``TESTS_FORK`` is its socket), passes
signals on to the forked process, and ends with its status. What cannot be forked is run as it is.
"""

import json
import os
import signal
import socket
import sys


def main():
    folder, name = os.path.split(os.path.abspath(sys.argv[0]))
    python, argv, kind = os.environ["TESTS_PYTHON"], sys.argv[1:], os.environ.get("TESTS_KIND", "commands")
    if name == "python":
        given, argv = argv, argv[1:] if argv[:1] == ["-u"] else argv
        program = {"argv": argv} if argv and os.path.isfile(argv[0]) else None
        if argv[:1] == ["-m"] and len(argv) > 1:
            program = {"argv": argv[1:], "module": argv[1]}
        if argv[:1] == ["-c"] and len(argv) > 1:
            program, kind = {"argv": ["-c", *argv[2:]], "code": argv[1]}, "programs"
    else:
        path = os.path.join(os.path.dirname(python), name)
        given, program = [path, *argv], {"argv": [path, *argv]}
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(f"{os.environ['TESTS_FORK']}-{kind}")
        except OSError:
            program = None
        if program is None:
            os.execv(python, [python, *given])
        job = json.dumps({**program, "env": dict(os.environ), "cwd": os.getcwd()}).encode()
        socket.send_fds(server, [len(job).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(job)
        answers = server.makefile()
        child = int(answers.readline())
        if child < 0:  # the environment is another one than that of the process that forks
            os.execv(python, [python, *given])
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: os.kill(child, number))
        status = int(answers.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


main()
