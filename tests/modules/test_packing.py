import pytest
import torch

from fairseq_adaptive.modules.stack.packing import Groups


@pytest.mark.parametrize("kept", (0.0, 0.3, 1.0))
def test_groups_put_each_sequence_into_a_row(kept):
    torch.manual_seed(2)
    mask = torch.rand(6, 9) < kept
    mask[0, 0], mask[4] = True, False
    rows = mask.flatten().nonzero().squeeze(1)
    groups = Groups(rows // 9, 6)
    padded, active = groups.pad(rows), mask.any(1)
    assert padded.shape == (active.sum(), mask.sum(1).max())
    for line, own in zip(padded, [row.nonzero().squeeze(1) + 9 * n for n, row in enumerate(mask) if row.any()]):
        assert torch.equal(line[: len(own)], own) and not line[len(own) :].any()
    assert torch.equal(groups.unpad(padded), rows)
    assert torch.equal(groups.select(torch.arange(6)), active.nonzero().squeeze(1))
