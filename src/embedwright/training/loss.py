"""InfoNCE over cosine scores. Q queries, C candidates, E embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(q_QE: Tensor, c_CE: Tensor, positive_Q: Tensor, allowed_QC: Tensor, temperature: float) -> Tensor:
    """Mean over queries of -log softmax(cos/temperature) at the positive, among it and the allowed candidates.

    Unit-length float32 inputs; `positive_Q` int64 column of each query, `allowed_QC` bool. A query without any
    allowed candidate gives 0. Source: E5-Mistral (arXiv 2401.00368), equation 2; NV-Embed states no formula.
    """
    with torch.autocast(q_QE.device.type, enabled=False):  # bf16 scores would be off by 0.2 at temperature 0.02
        scores_QC = q_QE @ c_CE.T / temperature
    stands_QC = allowed_QC.scatter(1, positive_Q[:, None], True)
    return F.cross_entropy(scores_QC.masked_fill(~stands_QC, float("-inf")), positive_Q)
