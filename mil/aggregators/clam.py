"""CLAM-SB: gated attention and a loss on the tiles that it looks at most and least.

Lu et al., Nature Biomedical Engineering 2021, Methods: "CLAM architecture", "Instance-level clustering", "Smooth SVM
loss"; the smooth loss is Berrada, Zisserman, Kumar (ICLR 2018, equation 7 with k = 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional

from mil.aggregators.batch import Parameters, Prediction
from mil.aggregators.chance import Chance
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import attention_scores, cross_entropy, layer, of_label, shared_linear
from mil.aggregators.places import Segments
from mil.aggregators.segments import chosen_rows, segment_extremes, segment_softmax, segment_sum

MARGIN = 1.0
"""Of the smooth SVM loss, whose temperature is 1 too (Lu et al., Methods)."""


class CLAMSB(Aggregator):
    """ABMIL with one attention branch for all classes, and an instance loss while training.

    Each class has a small classifier of tiles, "typical of the class or not". For a bag of that class the n_instances
    tiles with the highest attention are to be typical and the n_instances with the lowest are not. A bag with fewer
    than 2 n_instances tiles gives half of them to each side, so that no tile is told both; a single tile is.

    Training minimises (1 - instance_weight) * cross-entropy + instance_weight * instance loss.

    | | as published | ours | why |
    | --- | --- | --- | --- |
    | embedding, attention | ReLU 512, gated 256, dropout 0.25 | the same | |
    | two classes | two logits | one | one logit says the same |
    | instance loss | smooth SVM, 8 + 8 tiles | the same | |
    | fewer than 16 tiles | an error | half to each side | a bag of any size |
    | parameters, 768 features, one logit | 659,719 | 659,206 | one logit fewer |

    Args:
        hidden: width of the ReLU embedding. attention: width of the gated attention.
        dropout: of embedding, attention and gate, in training only.
        n_instances: tiles at each end of the attention.
        instance_weight: share of the instance loss; 0 = none.
        subtyping: also tell the other classes' classifiers that these tiles are not typical of them (for mutually
            exclusive classes; not for tumour against normal).
    """

    members_at_a_time = 1
    draws = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        hidden: Annotated[int, Ge(1)] = 512,
        attention: Annotated[int, Ge(1)] = 256,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.25,
        n_instances: Annotated[int, Ge(1)] = 8,
        instance_weight: Annotated[float, Ge(0), Lt(1)] = 0.3,
        subtyping: bool = False,
    ):
        super().__init__(in_dim, n_outputs, seeds)
        self.dropout, self.n_instances = dropout, n_instances
        self.instance_weight, self.subtyping = instance_weight, subtyping
        self.n_labels = max(n_outputs, 2)
        self.hidden = hidden
        self.add_linear("embed", in_dim, hidden)
        self.add_attention("", hidden, attention)
        self.add_linear("typical", hidden, self.n_labels * 2)
        self.add_linear("head0", hidden, n_outputs)
        self.floats_per_tile = 4 * hidden + 10 * attention
        self.floats_per_bag = 2 * hidden + 2 * n_instances * (hidden + 8 * self.n_labels)

    def pool(
        self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters, chance: Chance | None = None
    ) -> tuple[Tensor, Tensor]:
        """Columns: the attended mean (H), then the instance loss for each label that the bag could have."""
        drop = self.dropping(lengths_b, chance)
        h_mTH = drop(torch.relu(shared_linear(tiles_TD, *self.first_layer("embed", p))), "embed")
        scores_mT = attention_scores("", h_mTH, p, drop=drop)
        weights_mT = segment_softmax(scores_mT, lengths_b)
        pooled_mbH = segment_sum(weights_mT, h_mTH, lengths_b)
        if isinstance(lengths_b, Segments):
            losses_mbL = self.losses_of_bags(scores_mT, h_mTH, lengths_b, p)
            return torch.cat([pooled_mbH, losses_mbL], dim=2), weights_mT
        bags = zip(scores_mT.split(list(lengths_b), dim=1), h_mTH.split(list(lengths_b), dim=1), strict=True)
        losses_mbL = torch.stack([self.instance_losses(*bag, p) for bag in bags], dim=1)
        return torch.cat([pooled_mbH, losses_mbL], dim=2), weights_mT

    def instance_losses(self, scores_mN: Tensor, h_mNH: Tensor, p: Parameters) -> Tensor:
        """Of one bag with N tiles, for every label it could have: (m, labels)."""
        n_tiles, width = h_mNH.shape[1:]
        k = min(self.n_instances, max(n_tiles // 2, 1))
        rows_mK = torch.cat([scores_mN.detach().topk(k, largest=side).indices for side in (True, False)], dim=1)
        chosen_mKH = h_mNH.gather(1, rows_mK.unsqueeze(2).expand(-1, -1, width))
        logits_mKLS = layer("typical", chosen_mKH, p).unflatten(2, (-1, 2))
        evidence_mKL = logits_mKLS[..., 1] - logits_mKLS[..., 0]
        high_mkL, low_mkL = evidence_mKL.split(k, dim=1)
        inside_mL = (smooth_svm(high_mkL).mean(dim=1) + smooth_svm(-low_mkL).mean(dim=1)) / 2
        if not self.subtyping:
            return inside_mL
        outside_mL = smooth_svm(-high_mkL).mean(dim=1)
        return (inside_mL + outside_mL.sum(dim=1, keepdim=True) - outside_mL) / self.n_labels

    def losses_of_bags(self, scores_mT: Tensor, h_mTH: Tensor, lengths_b: Segments, p: Parameters) -> Tensor:
        """`instance_losses` of all bags on a device, (m, b, labels): small bags' spare places count nothing."""
        n = self.n_instances
        rows_mbK = segment_extremes(scores_mT.detach(), lengths_b, n, n)
        chosen_mRH = chosen_rows(h_mTH, rows_mbK.flatten(1))
        logits_mbKLS = layer("typical", chosen_mRH, p).view(*rows_mbK.shape, self.n_labels, 2)
        high_mbkL, low_mbkL = (logits_mbKLS[..., 1] - logits_mbKLS[..., 0]).split(n, dim=2)
        k_b1 = (lengths_b.lengths_b // 2).clamp(1, n).unsqueeze(1)
        shares_bk1 = ((torch.arange(n, device=scores_mT.device) < k_b1) / k_b1).unsqueeze(2)

        def mean(evidence_mbkL: Tensor) -> Tensor:
            return (smooth_svm(evidence_mbkL) * shares_bk1).sum(dim=2)

        inside_mbL = (mean(high_mbkL) + mean(-low_mbkL)) / 2
        if not self.subtyping:
            return inside_mbL
        outside_mbL = mean(-high_mbkL)
        return (inside_mbL + outside_mbL.sum(dim=2, keepdim=True) - outside_mbL) / self.n_labels

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return self.linear("head0", pooled_MBP[..., : self.hidden])

    def tile_logits(self, tiles_TD: Tensor) -> Tensor:
        return self.with_cuts(self.head(torch.relu(shared_linear(tiles_TD, *self.first_layer("embed", self.stacks())))))

    def losses(self, prediction: Prediction, labels: Tensor) -> Tensor:
        assert prediction.pooled_MBP is not None
        bag_MB = cross_entropy(prediction.logits_MBC.float(), labels)
        instance_MB = of_label(prediction.pooled_MBP[..., self.hidden :].float(), labels)
        return (1 - self.instance_weight) * bag_MB + self.instance_weight * instance_MB

    def left_out(self) -> str:
        return "CLAM's instance loss needs classes" if self.instance_weight else ""


def smooth_svm(evidence: Tensor) -> Tensor:
    """Smooth top-1 SVM loss: log(exp(s_right) + exp(MARGIN + s_wrong)) - s_right; evidence = s_right - s_wrong."""
    return functional.softplus(MARGIN - evidence)
