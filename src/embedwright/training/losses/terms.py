"""The terms of the loss, over embeddings. Q queries, C candidates, N texts, S scored pairs, E embedding.

Vectors are of unit length, so that an inner product is a cosine. All is computed in the type of the vectors (float32
in training), under autocast too: bf16 scores would be off by 0.2 at temperature 0.02.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from embedwright.packing import moved


def info_nce(
    q_QE: Tensor,
    c_CE: Tensor,
    positive_Q: Tensor,
    allowed_QC: Tensor,
    temperature: float,
    *,
    queries_QQ: Tensor | None = None,
    documents_QC: Tensor | None = None,
    mask_above: float | None = None,
    hardness: float = 0.0,
    hard_QC: Tensor | None = None,
    focal: float = 0.0,
) -> Tensor:
    """Computes the mean over queries of -log softmax(cos/temperature) at the positive, among it and the allowed
    candidates.

    `positive_Q` int64 column of each query, `allowed_QC` bool. A query without any allowed candidate gives 0. Source:
    E5-Mistral (arXiv 2401.00368), equation 2; NV-Embed states no formula. Added on request:

    - same-tower negatives: `queries_QQ` bool marks other queries, `documents_QC` bool candidates that stand against
      the query's positive: cos(q_i, q_j) and cos(d_i+, d_j) join the sum. Source: Qwen3-Embedding (arXiv
      2506.05176); GTE (arXiv 2308.03281), which also has cos(d_i+, q_j).
    - `mask_above`: a negative, of whatever kind, whose cosine is above cos(q, d+) + `mask_above` is left out. Source:
      Qwen3-Embedding, with 0.1.
    - `hardness`: the exponential of a negative in `hard_QC` is multiplied by exp(hardness * cos), a constant to the
      gradient. Source: EmbeddingGemma (arXiv 2509.20354), with 5; after Robinson et al. (arXiv 2010.04592), who
      divide by the mean weight.
    - `focal`: query i's loss is multiplied by (1 - p_i) ** focal, p_i its softmax at the positive, a constant to the
      gradient, which has no limit at p = 1 below focal = 1. Source: KaLM-Embedding-V2 (arXiv 2506.20923), after Lin
      et al. (arXiv 1708.02002).
    """
    with torch.autocast(q_QE.device.type, enabled=False):
        cos = [q_QE @ c_CE.T]
        allowed = [allowed_QC.scatter(1, positive_Q[:, None], False)]
        if queries_QQ is not None:
            cos.append(q_QE @ q_QE.T)
            allowed.append(queries_QQ)
        if documents_QC is not None:
            cos.append(c_CE[positive_Q] @ c_CE.T)
            allowed.append(documents_QC)
        cos_QX, allowed_QX = torch.cat(cos, dim=1), torch.cat(allowed, dim=1)
        if mask_above is not None:
            known_QX = cos_QX.detach()
            allowed_QX = allowed_QX & (known_QX <= known_QX.gather(1, positive_Q[:, None]) + mask_above)
        scores_QX = cos_QX / temperature
        if hardness and hard_QC is not None:
            weights_QC = hardness * cos[0].detach() * (hard_QC & allowed[0])
            scores_QX = scores_QX + F.pad(weights_QC, (0, scores_QX.shape[1] - weights_QC.shape[1]))
        stands_QX = allowed_QX.scatter(1, positive_Q[:, None], True)
        scores_QX = scores_QX.masked_fill(~stands_QX, float("-inf"))
        if not focal:
            return F.cross_entropy(scores_QX, positive_Q)
        losses_Q = F.cross_entropy(scores_QX, positive_Q, reduction="none")
        return (torch.pow(-torch.expm1(-losses_Q.detach()), focal) * losses_Q).mean()


def cosent(q_SE: Tensor, d_SE: Tensor, score_S: Tensor, temperature: float) -> Tensor:
    """Computes log(1 + sum over i, j with score_i > score_j of exp((cos_j - cos_i)/temperature)), cos_i = cos(q_i,
    d_i).

    It asks for the order of the cosines alone, so `score_S` may be on any scale; pairs of equal score ask nothing. Of
    scores in the CPU's memory, a GPU is not waited for.
    Source: CoSENT, Su 2022 (kexue.fm/archives/8847), and IEEE/ACM TASLP 2024, doi 10.1109/TASLP.2024.3402087.
    """
    with torch.autocast(q_SE.device.type, enabled=False):
        cos_S = (q_SE * d_SE).sum(1) / temperature
    ordered = (score_S[:, None] > score_S[None, :]).nonzero(as_tuple=True)
    better, worse = (moved(places, cos_S.device) for places in ordered)
    return F.pad((cos_S[None, :] - cos_S[:, None])[better, worse], (1, 0)).logsumexp(0)


def spread_out(vectors_NE: Tensor) -> Tensor:
    """Computes the mean of cos(i, j) ** 2 over all pairs of different texts: 1/(N(N-1)) times the sum over i != j.

    It is least where vectors stand at right angles. One text alone gives 0. Source: EmbeddingGemma (arXiv 2509.20354),
    which adds that of a batch's queries and that of its positives; the second moment of the global orthogonal
    regulariser (arXiv 1708.06320), without its margin 1/E and without its first moment.
    """
    with torch.autocast(vectors_NE.device.type, enabled=False):
        cos_NN = torch.triu(vectors_NE @ vectors_NE.T, diagonal=1)
    return cos_NN.square().sum() / max(len(cos_NN) * (len(cos_NN) - 1) / 2, 1)


def score_distillation(
    q_QE: Tensor, c_CE: Tensor, teacher_QC: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """Computes the mean over queries of KL(softmax(teacher/teacher_temperature) || softmax(cos/temperature)).

    Both softmaxes are over the candidates that `teacher_QC` float has a score for, NaN elsewhere; a query with fewer
    than two gives 0. A GPU is not waited for if `teacher_QC` is in the CPU's memory. The factor temperature ** 2 is
    left out. Source: Lin et al. (arXiv 2010.11386); as contrastive distillation in KaLM-Embedding-V2 (arXiv
    2506.20923).
    """
    known_QC = ~teacher_QC.isnan()
    rows = known_QC.any(1).nonzero().squeeze(1)  # the softmax of no score at all would be NaN
    unknown, teacher = (moved(of_rows, q_QE.device) for of_rows in (~known_QC[rows], teacher_QC[rows]))
    rows = moved(rows, q_QE.device)
    with torch.autocast(q_QE.device.type, enabled=False):
        scores = (q_QE[rows] @ c_CE.T / temperature).masked_fill(unknown, float("-inf"))
    teacher = (teacher / teacher_temperature).masked_fill(unknown, float("-inf"))
    ours, theirs = (x.log_softmax(1).masked_fill(unknown, 0.0) for x in (scores, teacher))
    return (theirs.exp().masked_fill(unknown, 0.0) * (theirs - ours)).sum() / len(q_QE)


def cosines(q_QE: Tensor, c_CE: Tensor) -> Tensor:
    """Computes the cosine of each query and each candidate (Q, C), whatever the length of their vectors."""
    with torch.autocast(q_QE.device.type, enabled=False):
        return F.normalize(q_QE, dim=-1) @ F.normalize(c_CE, dim=-1).T


def vector_distance(own_NE: Tensor, teacher_NE: Tensor) -> Tensor:
    """Computes 1 - cosine of each text's vector and the teacher's, which may be of any length: float (N,).

    Source: EmbedDistill (arXiv 2301.12005), equations 7 and 8, whose squared distance of unit vectors is twice this;
    EmbeddingGemma (arXiv 2509.20354) for query, positive and hard negative.
    """
    with torch.autocast(own_NE.device.type, enabled=False):
        return 1 - (own_NE * F.normalize(teacher_NE, dim=-1)).sum(-1)


def projected(vectors_NE: Tensor, projection_TE: Tensor) -> Tensor:
    """Maps vectors linearly to another width, at unit length again (LEAF, arXiv 2509.12539)."""
    with torch.autocast(vectors_NE.device.type, enabled=False):
        return F.normalize(vectors_NE @ projection_TE.T, dim=-1)


def vector_distillation(distance_Q: Tensor, distance_C: Tensor, own_QC: Tensor) -> Tensor:
    """Computes the mean over queries of the mean distance of a query's own texts: itself, and its candidates in
    `own_QC` bool.
    """
    own_QC = own_QC.to(distance_Q.dtype)
    with torch.autocast(distance_Q.device.type, enabled=False):
        return ((distance_Q + own_QC @ distance_C) / (1 + own_QC.sum(1))).mean()


def cut(vectors_NE: Tensor, width: int) -> Tensor:
    """Returns the first `width` dimensions of each vector, at unit length again (Matryoshka, arXiv 2205.13147)."""
    return F.normalize(vectors_NE[:, :width], dim=-1)
