"""Trainings in child processes of a process that has imported everything, one after another, each cheap to begin.

Run as a program it is that process: it trains nothing itself, as torch computes no gradients in a fork of a process that
has computed some.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

TESTS = Path(__file__).parents[1]


class Forks:
    """Example:
    >>> with Forks() as forks:
    ...     status, log = forks.train(flags, tmp_path / "log")
    """

    def __enter__(self):
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()

    def train(self, flags, log, kill_at=None):
        """``fairseq-train`` with these flags, which kills itself at its ``kill_at``-th moment.

        Returns its status (minus the signal where it was killed), what it logged, and the number of its moments.
        """
        job = {"flags": [str(each) for each in flags], "log": str(log), "kill_at": kill_at}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        status = json.loads(self.server.stdout.readline())
        text = Path(log).read_text()
        moments = int(text.rpartition("moments: ")[2].split()[0]) if "moments: " in text else None
        return status, text, moments


class Moments:
    """Counts where a training can be stopped: before and after an update, and at every step of work on its files."""

    def __init__(self, save_dir, kill_at):
        self.save_dir, self.kill_at, self.count = save_dir, kill_at, 0

    def __call__(self, *_):
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def hook(self, event, args):
        if event in ("open", "os.rename", "os.remove", "os.truncate") and str(args[0]).startswith(self.save_dir):
            if threading.current_thread() is threading.main_thread():
                self()

    def save(self, stock):
        """``torch.save`` in four writes."""
        import io

        def save(obj, file):
            whole = io.BytesIO()
            stock(obj, whole)
            size = -(-whole.tell() // 4)
            for start in range(4):
                self()
                file.write(whole.getvalue()[start * size : (start + 1) * size])
                file.flush()
            self()

        return save

    def train_step(self, stock):
        def train_step(*args, **kwargs):
            self()
            result = stock(*args, **kwargs)
            self()
            return result

        return train_step


def _train(job):
    import torch
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.trainer import Trainer
    from fairseq_cli import train

    args = options.parse_args_and_arch(options.get_training_parser(), job["flags"])
    moments = Moments(args.save_dir, job["kill_at"])
    sys.addaudithook(moments.hook)
    torch.save = moments.save(torch.save)
    Trainer.train_step = moments.train_step(Trainer.train_step)
    train.main(convert_namespace_to_omegaconf(args))
    print("moments:", moments.count, flush=True)


def _child(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    with contextlib.suppress(BaseException):
        try:
            _train(job)
            status = 0
        except BaseException:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main():
    answers = os.fdopen(os.dup(1), "w")  # fairseq logs to the standard output
    os.dup2(2, 1)
    import torch
    import torch._dynamo  # seconds, which else every child spends when it makes an optimizer

    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    from fairseq_cli import train  # noqa: F401

    import families  # noqa: F401
    import fairseq_adaptive.plugin  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            _child(job)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), file=answers, flush=True)


if __name__ == "__main__":
    main()
