import pytest


@pytest.fixture(params=("torch", "triton"))
def backend(request, monkeypatch):
    """The name of the backend on which operations run in the test; without a GPU, Triton's is its interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_KERNELS", request.param)
    return request.param
