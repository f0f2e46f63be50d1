"""torch's DistributedDataParallel around models with shared layers and policies: gradients are the mean over the workers."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from families import build_trainer, write_data

CASES = {
    "shared_transformer": "",
    "shared_transformer --checkpoint-activations": "",
    "shared_transformer --encoder-layerdrop 0.3 --decoder-layerdrop 0.3": "find_unused_parameters",
    "skimming_decoder": "",
    "transkimmer": "find_unused_parameters",
}


def built(case, data):
    family, *flags = case.split()
    trainer, batches = build_trainer(family, data, "--max-update", "5", *flags)
    return trainer.model, trainer.criterion, [batch for _, batch in zip(range(4), batches)]


def gradients(called, model, criterion, batch):
    model.zero_grad()
    torch.manual_seed(3)  # LayerDrop and noise are those of every worker
    criterion(called, batch)[0].backward()
    return {
        name: torch.zeros_like(each) if each.grad is None else each.grad.clone()
        for name, each in model.named_parameters()
    }


def worker(rank, data, port, queue):
    from fairseq.distributed import ModuleProxyWrapper

    import fairseq_adaptive.plugin  # noqa: F401  registers models

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    for case, unused in CASES.items():
        alone = []
        for place in (0, 1):
            model, criterion, batches = built(case, data)
            alone.append(gradients(model.train(), model, criterion.train(), batches[place]))
        model, criterion, batches = built(case, data)
        parallel = torch.nn.parallel.DistributedDataParallel(
            model.train(), find_unused_parameters=bool(unused), broadcast_buffers=False
        )
        found = gradients(ModuleProxyWrapper(parallel), model, criterion.train(), batches[rank])
        apart = max(float((each - (alone[0][name] + alone[1][name]) / 2).abs().max()) for name, each in found.items())
        largest = max(float(each.abs().max()) for each in found.values())
        gradients(ModuleProxyWrapper(parallel), model, criterion, batches[2 + rank])  # which a missing gradient ends
        queue.put((case, rank, apart, largest))


@pytest.mark.slow
def test_gradients_are_the_mean_over_workers(tmp_path):
    data = write_data(tmp_path)
    with socket.socket() as asked:
        asked.bind(("localhost", 0))
        port = asked.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(worker, (data, port, queue), nprocs=2)
    found = [queue.get() for _ in range(2 * len(CASES))]
    assert {(case, rank) for case, rank, _, _ in found} == {(case, rank) for case in CASES for rank in (0, 1)}
    for case, _, apart, largest in found:
        assert apart <= 1e-6 * largest and largest > 1e-3, case
