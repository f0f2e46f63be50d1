"""Commands in processes that are forked from one which has imported torch and fairseq: importing takes longer than most.

A command so run is what a user's is: the installed entry point in a process, a folder and an environment of its own, with
the input, output and signals of who starts it. Scripts find it by PATH, torchrun by a variable of its own.
"""

import atexit
import contextlib
import ctypes
import gc
import hashlib
import importlib
import inspect
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Dict

# the program of a forked process is what follows serve(), so that errors are Python's own
_PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from cli.commands import end, serve
path, module, code = serve()
del sys.path[0], sys.modules["cli"], sys.modules["cli.commands"], serve
import runpy
try:
    if code is not None:
        sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    elif module:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(path, run_name="__main__")
except BaseException as error:
    end(error)
    raise
end(None)
"""
# what is there in a process of each kind before it becomes a command, and before it becomes a program (``python -c``):
# a program finds fairseq and ours not yet imported, but the libraries that take longest; torch's optimizers import dynamo
_LARGE = ("torch", "torch._dynamo", "sklearn.metrics", "sacrebleu")
_IMPORTED = {"programs": _LARGE, "commands": ("fairseq", "fairseq.trainer")}  # what each has beside the one before
_AT_START = ("PYTHON", "TRITON", "LD_", "OMP_", "CUDA")  # variables that are read when a program starts or imports
_COMMANDS = "adaptive eval-lm generate hydra-train interactive preprocess score train validate"
NAMES = ("python", "torchrun", *(f"fairseq-{name}" for name in _COMMANDS.split()))
_STREAMS = (("stdin", "r", "strict"), ("stdout", "w", "strict"), ("stderr", "w", "backslashreplace"))
_folder = None  # of stubs and socket


def is_read_at_start(name: str) -> bool:
    """Whether a program reads a variable when it starts, and a forked process cannot; one is that of torchrun."""
    return name.startswith(_AT_START) and name != "PYTHON_EXEC"


def at_start(environment) -> Dict[str, str]:
    """Of an environment what is read when a program starts."""
    return {name: value for name, value in environment.items() if is_read_at_start(name)}


def serve():
    """Fork for each job that comes to the socket of a kind; return in the forked process: path, module and code of what it is
    to run."""
    for kind, imported in _IMPORTED.items():
        for name in imported:
            importlib.import_module(name)
        if kind == [*_IMPORTED][-1] or not os.fork():
            break
    sys.pycache_prefix, sys.dont_write_bytecode = os.environ["TESTS_CACHE"], False  # compile what commands import once
    if "fairseq" in sys.modules:  # what hydra else does, and inspect learns of all files, in every process anew
        import quick_hydra

        quick_hydra.install(), quick_hydra.prime()
        inspect.stack()
    logging.getLogger().handlers.clear()  # commands set up their log before they import fairseq, which writes to it
    logging.getLogger().setLevel(logging.WARNING)
    return listen(kind)


def listen(kind):
    """Fork for each job that comes to the socket of a kind, from this process as it is; see :func:`serve`."""
    gc.collect(), gc.freeze()  # what is imported is not looked at in each process, which would copy it
    own, parent = at_start(os.environ), os.getppid()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{os.environ['TESTS_FORK']}-{kind}")
    listener.listen(64)
    listener.settimeout(10)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        finally:
            _reap()
        if not os.fork():
            listener.close()
            return _attend(connection, own)
        connection.close()
    os._exit(0)


def end(error):
    """End a forked process as Python does, but for taking apart all that is imported, which takes longer than most commands.

    Args:
        error: what ended its program, or None; an error is shown by ``sys.excepthook``

    Returns where Python itself has to end it: of an interrupt, a status that is a text, and where nothing can be written.
    """
    status = 0
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        status = error.code or 0
    elif isinstance(error, Exception):
        status = 1
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as exit:
            status = exit.code
    elif error is not None:
        return
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        for stream in sys.stdout, sys.stderr:
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        raise SystemExit(status) from None
    ctypes.CDLL(None).fflush(None)
    os._exit(status & 255)


def _reap():
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _attend(connection, own):
    """Wait for a job that is forked once more, and say how it ended; it is killed when who asked for it is gone."""
    connection.settimeout(None)
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    job = json.loads(_receive(connection, int.from_bytes(length, "big")))
    if at_start(job["env"]) != own:
        connection.sendall(b"-1\n")
        os._exit(0)
    child = os.fork()
    if not child:
        connection.close()
        return _become(job, files)
    for file in files:
        os.close(file)
    connection.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _receive(connection, length):
    parts = b""
    while len(parts) < length:
        parts += connection.recv(length - len(parts))
    return parts


def _become(job, files):
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for number, (name, mode, errors) in enumerate(_STREAMS):  # those that Python had opened knew another file
        stream = open(number, mode, -1 if number < 2 else 1, encoding="utf-8", errors=errors, closefd=False)
        setattr(sys, name, stream), setattr(sys, f"__{name}__", stream)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    folder = "" if "code" in job else job["cwd"] if "module" in job else os.path.dirname(job["argv"][0])
    sys.path[1] = folder  # behind the folder of the tests, which goes
    return job["argv"][0], job.get("module"), job.get("code")


def stubs(environment) -> Dict[str, str]:
    """Variables with which a script finds commands that are forked, and torchrun workers; the process that forks them is
    started here.

    Args:
        environment: that of the commands, in what is read when a program starts
    """
    global _folder
    if _folder is None:
        _folder = tempfile.TemporaryDirectory()
        for name in NAMES:
            path = Path(_folder.name, name)
            path.write_text(f"#!{sys.executable} -IS\n{Path(__file__).with_name('stub.py').read_text()}")
            path.chmod(0o755)
    number = hashlib.sha256(json.dumps(sorted(at_start(environment).items())).encode()).hexdigest()[:8]
    variables = {"TESTS_FORK": str(Path(_folder.name, number)), "TESTS_PYTHON": sys.executable}
    _start([f"{variables['TESTS_FORK']}-{kind}" for kind in _IMPORTED], {**environment, **variables})
    return {**variables, "PYTHON_EXEC": str(Path(_folder.name, "python"))}


def _start(addresses, environment):
    """Start the processes that fork, one of them the other's child, where there are none yet."""
    if all(map(os.path.exists, addresses)):
        return
    environment = {**environment, "TESTS_CACHE": str(Path(_folder.name, "cache"))}
    server = subprocess.Popen([sys.executable, "-c", _PROGRAM], env=environment, start_new_session=True)
    atexit.register(server.kill)
    while not all(map(os.path.exists, addresses)):
        assert server.poll() is None, "the process that forks commands has ended"
        time.sleep(0.05)


def serve_pages(environment):
    """Start the process from which programs of pages are forked (``page_server.py``), where there is none yet; they find it by
    ``TESTS_KIND=pages``.

    Args:
        environment: with what :func:`stubs` returns
    """
    address = f"{environment['TESTS_FORK']}-pages"
    if os.path.exists(address):
        return
    program = [str(Path(stub_folder(), "python")), str(Path(__file__).with_name("page_server.py"))]
    server = subprocess.Popen(program, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    atexit.register(server.kill)
    while not os.path.exists(address):
        assert server.poll() is None, "the process that forks programs of pages has ended"
        time.sleep(0.05)


def stub_folder() -> str:
    """Where the stubs are, for PATH; after :func:`stubs`."""
    return _folder.name
