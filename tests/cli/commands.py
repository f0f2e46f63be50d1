"""Commands in processes that are forked from one which has imported torch and fairseq: importing takes longer than most.

A command so run is what a user's is: the installed entry point in a process, a folder and an environment of its own. It
ends with its status, and what it wrote.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# the program of a forked process is what follows serve(), so that errors and the end of the process are Python's own
_PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from cli.commands import serve
path = serve()
del sys.path[0], sys.modules["cli"], sys.modules["cli.commands"], serve
import runpy
runpy.run_path(path, run_name="__main__")
"""
_AT_START = ("PYTHON", "TRITON", "LD_", "OMP_", "CUDA")  # variables that are read when a program starts or imports
_server = None


def serve() -> str:
    """Fork for each job that comes, a line of JSON; return in the forked process, the path of what it is to run."""
    import fairseq  # noqa: F401
    import fairseq.trainer  # noqa: F401

    logging.getLogger().handlers.clear()  # commands set up their log before they import fairseq, which writes to it
    logging.getLogger().setLevel(logging.WARNING)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        child = os.fork()
        if child:
            print(child, file=replies)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies)
            continue
        replies.close()
        return _become(json.loads(line))
    os._exit(0)


def _become(job):
    for number, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["stdout"], os.O_WRONLY),
        (2, job["stderr"], os.O_WRONLY),
    ):
        file = os.open(path, mode)
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    sys.path[1] = os.path.dirname(job["argv"][0])  # where -c has the current folder
    return job["argv"][0]


def forked(argv, environment, timeout, cwd=None):
    """As ``subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=timeout, cwd=cwd)``.

    Args:
        argv: path of a Python program, such as an entry point, and its arguments
    """
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        job = {"argv": argv, "env": environment, "cwd": os.fspath(cwd or os.getcwd())}
        job.update(zip(("stdout", "stderr"), map(str, files)))
        _server.stdin.write(json.dumps(job).encode() + b"\n")
        child = int(_server.stdout.readline())
        late = not select.select([_server.stdout], [], [], timeout)[0]
        if late:
            os.kill(child, signal.SIGKILL)
        status = int(_server.stdout.readline())
        out, errors = (file.read_text() for file in files)
    if late:
        raise subprocess.TimeoutExpired(argv, timeout, out, errors)
    return subprocess.CompletedProcess(argv, status, out, errors)


def can_fork(argv, env, options) -> bool:
    """Whether a command is a Python program that needs nothing which must be there when Python starts."""
    program = Path(argv[0])
    if not program.is_file() or set(options) - {"cwd"} or any(name.startswith(_AT_START) for name in env or ()):
        return False
    with program.open("rb") as file:
        return program.suffix == ".py" or b"python" in file.readline() and program.name != "torchrun"
