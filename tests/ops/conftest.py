import pytest
import torch

CUDA = torch.cuda.is_available()
ON_CUDA = pytest.param("cuda", marks=(pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")))


@pytest.fixture(params=("cpu", ON_CUDA))
def device(request):
    """Where the tensors of the test are made, its name."""
    with torch.device(request.param):
        yield request.param


@pytest.fixture(params=("torch", "triton"))
def backend(request, monkeypatch, device):
    """The name of the backend on which operations run in the test; on a CPU, Triton's is its interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if CUDA and device == "cpu":
            pytest.skip("Triton's interpreter is off where there is a CUDA device")
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_KERNELS", request.param)
    return request.param


@pytest.fixture
def poisoned():
    """New memory holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
