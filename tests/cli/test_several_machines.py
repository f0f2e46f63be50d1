"""Two machines: two launchers at once on this one, by the commands of docs/several-machines.md."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fairseq.distributed import utils as distributed_utils

from cli import commands
from cli.helpers import TINY_TRANSFORMER, USER_DIR, run, tiny_translation_data
from fairseq_adaptive.compat import workers
from fairseq_adaptive.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "several-machines.md").read_text(encoding="utf-8")
TORCHRUN, SBATCH = (block.strip() for block in re.findall(r"(?ms)^```bash\n(.*?)^```$", PAGE))
SMALL = [*TINY_TRANSFORMER, *"--dropout 0 --batch-size 8 --cpu --num-workers 0 --log-format json --max-epoch".split()]
# what there is on a machine of a SLURM cluster; srun starts the tasks of all machines here
STAND_INS = {
    "scontrol": 'test "$*" = "show hostnames n[0-1]" || exit 1\nprintf "localhost\\nlocalhost\\n"',
    "srun": 'while [[ $1 == --* ]]; do shift; done\nfor id in 0 1; do SLURM_NODEID=$id SLURM_PROCID=$id "$@" & done\n'
    "wait -n && wait -n",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[0-1]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_LOCALID": "0",
}


def free_port():
    with socket.socket() as asked:
        asked.bind(("localhost", 0))
        return str(asked.getsockname()[1])


def small(block, folder, save_dir, epochs):
    """A block of the page, for this machine, a tiny model, and one worker a machine."""
    for words, ours in (
        ("--nproc-per-node 8", "--nproc-per-node 1"),
        (" DATA ", f" {folder / 'data' / 'bin'} "),
        ("--user-dir fairseq_adaptive", f"--user-dir {USER_DIR}"),
        ("--max-tokens 4096 --save-dir checkpoints", f"{' '.join(SMALL)} {epochs} --save-dir {save_dir}"),
    ):
        assert words in block
        block = block.replace(words, ours)
    return block


def bash(block, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    environment.update(commands.stubs(environment))
    folders = (more.get("FIRST_PATH", ""), commands.stub_folder(), str(Path(sys.executable).parent), os.environ["PATH"])
    environment["PATH"] = os.pathsep.join(filter(None, folders))
    return subprocess.run(["bash", "-c", block], env=environment, capture_output=True, text=True, timeout=300)


def two_launchers(folder, save_dirs, epochs):
    port = free_port()

    def launch(rank):
        block = small(TORCHRUN, folder, save_dirs[rank], epochs)
        block = block.replace("--node-rank 0", f"--node-rank {rank}").replace(
            "--master-addr first", "--master-addr localhost"
        )
        return bash(block.replace("--master-port 29500", f"--master-port {port}"))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(launch, (0, 1)))


def logged(*done):
    """The losses, norms and numbers of updates of the epochs, by whatever worker has logged them."""
    lines = [line for each in done for line in (each.stdout + each.stderr).splitlines() if "| INFO | train | {" in line]
    records = [json.loads(line.split(" | ")[-1]) for line in lines]
    return [[record[f"train_{name}"] for name in ("loss", "gnorm", "num_updates", "wpb")] for record in records]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What one worker with two batches an update logs of two epochs; and the folder with the data."""
    folder = tmp_path_factory.mktemp("machines")
    data = tiny_translation_data(folder / "data", n_train=96, n_valid=17)
    flags = (
        f"--user-dir {USER_DIR} --arch shared_transformer --share-all-embeddings --optimizer adam --lr 0.0005".split()
    )
    one = run("fairseq-train", data, *flags, *SMALL, 2, "--update-freq", 2, "--save-dir", folder / "one")
    return folder, logged(one)


def test_two_machines_train_one_model(trained, tmp_path):
    """And go on; and where the second one does not see the checkpoint, both are told."""
    folder, one = trained
    assert [row[2] for row in one] == ["6", "12"]
    first = two_launchers(folder, [tmp_path / "two"] * 2, 1)
    assert [each.returncode for each in first] == [0, 0], first
    apart = two_launchers(folder, [tmp_path / "two", tmp_path / "other"], 2)
    for each in apart:
        assert each.returncode != 0
        (told,) = [line for line in each.stderr.splitlines() if "error: " in line]
        assert (
            "worker 0 of 2 has checkpoint_last.pt, the others have not: --save-dir is to be on a disk that all" in told
        )
    second = two_launchers(folder, [tmp_path / "two"] * 2, 2)
    assert logged(*first) + logged(*second) == one
    weights = [
        torch.load(path / "checkpoint_last.pt", weights_only=True)["model"]
        for path in (folder / "one", tmp_path / "two")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def cluster(tmp_path):
    """The folder of SLURM's programs."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.slow
def test_a_job_of_slurm(trained, cluster):
    folder, one = trained
    block = small(SBATCH, folder, cluster / "two", 1).replace("20000 + SLURM_JOB_ID % 20000", free_port())
    done = bash(block, FIRST_PATH=str(cluster), **SLURM)
    assert done.returncode == 0, done.stderr
    assert logged(done) == one[:1]


@pytest.mark.slow
@pytest.mark.parametrize("gpus", (0, 1))
def test_fairseq_reads_the_variables_of_slurm(trained, cluster, gpus, tmp_path):
    """It counts GPUs. Where there are none it would start no worker, and end well."""
    folder, one = trained
    flags = f"--user-dir {USER_DIR} --arch shared_transformer --share-all-embeddings --optimizer adam --lr 0.0005"
    world = f"--distributed-world-size 2 --distributed-port {free_port()} --distributed-backend gloo --ddp-backend legacy_ddp"
    train = f"srun fairseq-train {folder / 'data' / 'bin'} {flags} {' '.join(SMALL)} 1 {world} --save-dir {tmp_path / 'two'}"
    if not gpus:
        done = bash(train, FIRST_PATH=str(cluster), **SLURM)
    else:  # a process that reads sitecustomize.py, which none that is forked does
        (tmp_path / "sitecustomize.py").write_text("import torch.cuda\ntorch.cuda.device_count = lambda: 1\n")
        path = f"{cluster}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **SLURM, "PATH": path, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        done = subprocess.run(["bash", "-c", train], env=environment, capture_output=True, text=True, timeout=300)
    if gpus:
        assert done.returncode == 0 and logged(done) == one[:1], done.stderr
        return
    assert done.returncode != 0 and not (tmp_path / "two").exists()
    told = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert told == {
        "error: --distributed-world-size 2 starts a worker for each GPU, and there is none here: start workers on CPUs with "
        "torchrun"
    }


def test_machines_of_one_gpu_each(monkeypatch):
    """torchrun says how many workers there are, where fairseq has counted the one GPU; a number that was given stays."""
    asked = []
    monkeypatch.setattr(distributed_utils, "call_main", lambda cfg, main: asked.append(cfg.distributed_training))
    workers.count_torchrun_workers()
    for name, value in ("MASTER_ADDR", "first"), ("MASTER_PORT", "1"), ("RANK", "1"), ("WORLD_SIZE", "2"):
        monkeypatch.setenv(name, value)
    for given in (1, 8):
        training = argparse.Namespace(distributed_init_method=None, distributed_world_size=given)
        distributed_utils.call_main(
            argparse.Namespace(distributed_training=training, common=argparse.Namespace(tpu=False)), None
        )
    assert [each.distributed_world_size for each in asked] == [2, 8]
    monkeypatch.delenv("RANK")
    training = argparse.Namespace(distributed_init_method=None, distributed_world_size=1)
    distributed_utils.call_main(
        argparse.Namespace(distributed_training=training, common=argparse.Namespace(tpu=False)), None
    )
    assert asked[-1].distributed_world_size == 1


@pytest.mark.parametrize("backend", ("fully_sharded", "slowmo"))
def test_backends_of_fairscale(backend, monkeypatch):
    """They need it, and GPUs."""
    monkeypatch.setattr(distributed_utils, "call_main", lambda cfg, main: "trained")
    workers.check_backend()
    common = argparse.Namespace(cpu=True, tpu=False)

    def told():
        training = argparse.Namespace(ddp_backend=backend, distributed_world_size=2)
        return distributed_utils.call_main(argparse.Namespace(distributed_training=training, common=common), None)

    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"--ddp-backend {backend} needs fairscale: pip install fairscale"):
        told()
    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UsageError, match=f"--ddp-backend {backend} needs GPUs: use legacy_ddp"):
        told()
    common.cpu = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert told() == "trained"
