"""Which token belongs to which sequence."""

from __future__ import annotations

import torch

from carpool.kernels import reference


def test_segment_ids_name_the_owner_of_each_token() -> None:
    assert reference.segment_ids(torch.tensor([0, 2, 3, 6], dtype=torch.int32)).tolist() == [0, 0, 1, 2, 2, 2]
