"""Patches of fairseq's workers: several on a CPU, and none that train alone unawares."""

import importlib.util
import os

import torch

from fairseq_adaptive.errors import UsageError


def _torchrun_workers():
    if all(key in os.environ for key in ("MASTER_ADDR", "MASTER_PORT", "RANK")):
        return int(os.environ.get("WORLD_SIZE", 1))
    return 1


def train_cpu_workers():
    """torchrun on a CPU trains one model with several workers (gloo, legacy_ddp).

    fairseq counts its workers by CUDA devices. Under ``torchrun`` on a CPU it takes each process for the only one, and
    all train unrelated copies into one folder; told otherwise, it computes ``rank % 0``. ``pytorch_ddp`` passes
    ``device_ids``, which torch refuses for modules on a CPU; ``legacy_ddp`` does not. Without torchrun it starts as many
    workers as there are GPUs: none under SLURM, and ends well without having trained.
    """
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.call_main

    def call_main(cfg, main, **kwargs):
        training = cfg.distributed_training
        on_cpu = (cfg.common.cpu or not torch.cuda.is_available()) and not cfg.common.tpu
        if on_cpu and _torchrun_workers() > 1 and training.distributed_init_method is None:
            training.distributed_init_method = "env://"
            training.distributed_world_size = _torchrun_workers()
            training.distributed_rank = int(os.environ["RANK"])
            training.distributed_no_spawn = True
            training.device_id = 0
            training.distributed_backend = "gloo"
            if training.ddp_backend in ("c10d", "pytorch_ddp"):
                training.ddp_backend = "legacy_ddp"
        elif on_cpu and not training.distributed_no_spawn and not torch.cuda.device_count():
            if training.distributed_world_size > 1:
                raise UsageError(
                    f"--distributed-world-size {training.distributed_world_size} starts a worker for each GPU, and there is none "
                    "here: start workers on CPUs with torchrun"
                )
        return stock(cfg, main, **kwargs)

    distributed_utils.call_main = call_main


def refuse_lone_workers():
    """torchrun workers that would train unrelated copies into one folder are refused.

    ``fairseq-hydra-train`` imports ``user_dir`` when training has begun, too late for :func:`train_cpu_workers`.
    ``is_master`` is asked after that and before anything is written.
    """
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.is_master

    def is_master(training):
        workers = _torchrun_workers()
        if workers > 1 and training.distributed_world_size == 1:
            raise UsageError(
                f"torchrun started {workers} workers, but each would train a copy of its own into the same folder. Use "
                "fairseq-train, or set in distributed_training: distributed_init_method='env://', "
                f"distributed_world_size={workers}, distributed_rank='${{oc.decode:${{oc.env:RANK}}}}', "
                "distributed_no_spawn=true, and on a CPU distributed_backend=gloo, ddp_backend=legacy_ddp"
            )
        return stock(training)

    distributed_utils.is_master = is_master


def count_torchrun_workers():
    """torchrun on machines of one GPU each trains one model.

    fairseq asks torchrun how many workers there are where ``--distributed-world-size`` is not 1, and that is the number of
    GPUs of this machine by default: with one each, every machine would train a model of its own.
    """
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.call_main

    def call_main(cfg, main, **kwargs):
        training = cfg.distributed_training
        if training.distributed_init_method is None and training.distributed_world_size == 1 and not cfg.common.tpu:
            training.distributed_world_size = _torchrun_workers()
        return stock(cfg, main, **kwargs)

    distributed_utils.call_main = call_main


def check_backend():
    """``--ddp-backend fully_sharded`` and ``slowmo`` without fairscale, or without GPUs, are refused.

    fairseq ends with an ``ImportError`` behind a traceback; fairscale asks CUDA of what is on a CPU.
    """
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.call_main

    def call_main(cfg, main, **kwargs):
        backend = cfg.distributed_training.ddp_backend
        if backend in ("fully_sharded", "slowmo"):
            if importlib.util.find_spec("fairscale") is None:
                raise UsageError(f"--ddp-backend {backend} needs fairscale: pip install fairscale")
            if cfg.common.cpu or not torch.cuda.is_available():
                raise UsageError(f"--ddp-backend {backend} needs GPUs: use legacy_ddp")
        return stock(cfg, main, **kwargs)

    distributed_utils.call_main = call_main


def see_one_save_dir():
    """Workers of which some find a checkpoint to go on from and others do not are refused.

    Worker 0 alone saves, so that on machines that share no disk the others have nothing. Those that find a checkpoint would
    wait without end for those that do not.
    """
    from fairseq.distributed import utils as distributed_utils
    from fairseq.file_io import PathManager
    from fairseq.trainer import Trainer

    stock = Trainer.load_checkpoint

    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        if self.data_parallel_world_size > 1 and not self.tpu:
            mine = bool(PathManager.isfile(filename)), bool(reset_optimizer)
            seen = distributed_utils.all_gather_list(mine, group=self.data_parallel_process_group)
            if len({*map(tuple, seen)}) > 1:
                have = [str(rank) for rank, (there, _) in enumerate(seen) if there]
                raise UsageError(
                    f"worker {', '.join(have)} of {len(seen)} has {os.path.basename(filename)}, the others have not: --save-dir "
                    "is to be on a disk that all machines share"
                )
        return stock(self, filename, reset_optimizer, *args, **kwargs)

    Trainer.load_checkpoint = load_checkpoint


def exchange_objects():
    """Several workers can resume, and gather logging outputs on a CPU.

    Workers that resume get the checkpoint from worker 0 through ``torch.load``, which refuses fairseq's own classes in
    it (worker 0 has read the file safely by then). Workers that gather logging outputs ask for a CUDA buffer, also on a
    CPU. torch's own collectives do both.
    """
    import torch.distributed as dist
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.all_gather_list

    def broadcast_object_slow(obj, src_rank, group, dist_device):
        box = [obj]
        dist.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    def all_gather_list(data, group=None, max_size=16384):
        group = distributed_utils.get_global_group() if group is None else group
        if torch.cuda.is_available() or distributed_utils.use_xla():
            return stock(data, group=group, max_size=max_size)
        gathered = [None] * distributed_utils.get_world_size(group)
        dist.all_gather_object(gathered, data, group=group)
        return gathered

    distributed_utils._broadcast_object_slow = broadcast_object_slow
    distributed_utils.all_gather_list = all_gather_list


def validate_uneven_batches():
    """``fairseq-validate`` takes any number of batches with any number of workers.

    A worker that has no batch left gets an empty one; the trainer knows that, and this command does not.
    """
    from fairseq import checkpoint_utils
    from fairseq.distributed import utils as distributed_utils

    stock = checkpoint_utils.load_model_ensemble_and_task

    def load_model_ensemble_and_task(*args, **kwargs):
        models, cfg, task = stock(*args, **kwargs)
        if kwargs.get("task") or distributed_utils.get_data_parallel_world_size() == 1:
            return models, cfg, task
        valid_step, reduce_metrics = task.valid_step, task.reduce_metrics
        task.valid_step = lambda sample, *rest: valid_step(sample, *rest) if sample else (0, 0, {})
        task.reduce_metrics = lambda logs, criterion: reduce_metrics([log for log in logs if log], criterion)
        return models, cfg, task

    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task
