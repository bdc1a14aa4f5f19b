"""DTFD-MIL: pseudo-bags, and what they distil (Zhang et al., CVPR 2022, sections 3.2 and 3.3, equations 4 to 8).

Widths (ReLU embedding 512, gated attention 128) and four pseudo-bags are those of the authors' published code. torchmil
1.0.2 differs from both: it ranks tiles without their attention, and its `max` and `maxmin` distil every tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from mil.aggregators.batch import Parameters, Prediction
from mil.aggregators.chance import Chance
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import (
    attention_scores,
    cross_entropy,
    cross_entropy_by_label,
    layer,
    of_label,
    shared_linear,
)
from mil.aggregators.places import Segments
from mil.aggregators.segments import chosen_rows


class DTFD(Aggregator):
    """ABMIL twice: over the tiles of each pseudo-bag, then over what the pseudo-bags hand on.

    A bag's tiles are dealt into pseudo-bags at random, afresh for every member, slide and epoch. In evaluation they are
    dealt in turn (tile 0 to the first, tile 1 to the second, ...), so that a slide has one result; the published code
    shuffles there too. The first tier (and the embedding) learns from the mean cross-entropy of the pseudo-bags alone,
    the second from the bag's alone, as in the published code, which has an optimiser for each; `end_to_end` lets the
    bag's reach the first tier too.

    | | as published | ours | why |
    | --- | --- | --- | --- |
    | embedding | ReLU 512, no bias | ReLU 512, bias | as every other layer here |
    | attention | gated, 128, both tiers | the same | |
    | two classes | two logits | one | one logit says the same |
    | gradients | a tier from its own loss | the same, or `end_to_end` | |
    | their size | clipped at 5 | not clipped | Adam divides it out |
    | pseudo-bags in evaluation | at random | in turn | a slide has one result |
    | several classes, maxs | tiles of the last class | tiles of each | no class is special |
    | parameters, 768 features, one logit | 658,182 | 657,668 | a bias more, two logits fewer |

    Args:
        hidden: width of the ReLU embedding. attention: width of the attention of both tiers.
        gated: tanh and sigmoid layers (Ilse et al. 2018, equation 9) instead of tanh alone.
        pseudo_bags: how many; a bag with fewer tiles has one for each tile.
        distill: what a pseudo-bag hands on. afs: its attended mean; maxs: the tile with the highest class activation,
            for several classes one of each; maxmins: also the one with the lowest.
        end_to_end: the bag's loss trains both tiers.
    """

    members_at_a_time = 1
    draws = True
    order_matters = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        hidden: Annotated[int, Ge(1)] = 512,
        attention: Annotated[int, Ge(1)] = 128,
        gated: bool = True,
        pseudo_bags: Annotated[int, Ge(1)] = 4,
        distill: Literal["afs", "maxs", "maxmins"] = "afs",
        end_to_end: bool = False,
    ):
        super().__init__(in_dim, n_outputs, seeds)
        self.hidden, self.gated, self.pseudo_bags, self.distill = hidden, gated, pseudo_bags, distill
        self.end_to_end = end_to_end
        self.add_linear("embed", in_dim, hidden)
        self.add_attention("tier1_", hidden, attention, gated)
        self.add_attention("tier2_", hidden, attention, gated)
        self.add_linear("tier1_head", hidden, n_outputs)
        self.add_linear("head0", hidden, n_outputs)
        handed_on = {"afs": 1, "maxs": n_outputs, "maxmins": 2 * n_outputs}[distill]
        self.floats_per_tile = hidden + 4 * attention + 4 * pseudo_bags
        self.floats_per_bag = pseudo_bags * handed_on * (hidden + 5 * attention) + (pseudo_bags + 4) * hidden

    def pool(
        self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters, chance: Chance | None = None
    ) -> tuple[Tensor, Tensor]:
        """Columns: the second tier's attended mean (H), the first tier's loss for each label it could have, and the
        mean of its logits (C)."""
        h_mTH = torch.relu(shared_linear(tiles_TD, *self.first_layer("embed", p)))
        scores_mT = attention_scores("tier1_", h_mTH, p, self.gated)
        if isinstance(lengths_b, Segments):
            return self.pool_on_device(h_mTH, scores_mT, lengths_b, p, chance)
        pooled, scores = [], []
        bags = zip(h_mTH.split(list(lengths_b), dim=1), scores_mT.split(list(lengths_b), dim=1), strict=True)
        for b, (h_mLH, scores_mL) in enumerate(bags):
            weights_mnL = self.weights(scores_mL, self.deal(scores_mL, chance.of_bags([b]) if chance else None))
            means_mnH = weights_mnL @ h_mLH
            logits_mnC = layer("tier1_head", means_mnH, p)
            losses_mX = cross_entropy_by_label(logits_mnC).mean(dim=1)
            distilled_mnKH = self.distilled(h_mLH, weights_mnL, means_mnH, p)
            flat_mRH = distilled_mnKH.flatten(1, 2)
            if not self.end_to_end:  # the second tier's loss stops here
                flat_mRH = flat_mRH.detach()
            shares_mR = torch.softmax(attention_scores("tier2_", flat_mRH, p, self.gated), dim=1)
            mean_mH = (shares_mR.unsqueeze(1) @ flat_mRH).squeeze(1)
            pooled.append(torch.cat([mean_mH, losses_mX, logits_mnC.mean(dim=1)], dim=1))
            shares_mn = shares_mR.unflatten(1, distilled_mnKH.shape[1:3]).sum(dim=2)
            scores.append((shares_mn.unsqueeze(1) @ weights_mnL.detach()).squeeze(1).detach())
        return torch.stack(pooled, dim=1), torch.cat(scores, dim=1)

    def pool_on_device(
        self, h_mTH: Tensor, scores_mT: Tensor, lengths_b: Segments, p: Parameters, chance: Chance | None
    ) -> tuple[Tensor, Tensor]:
        """`pool` in operations over all bags, behind the first tier's scores.

        Every bag has `pseudo_bags` of them, n; those that a small bag does not have are empty and count nothing.
        Where bags have one length, g is members x bags and S is n; else g is members and S is bags x n.
        """
        m, n_bags, n = len(h_mTH), len(lengths_b), self.pseudo_bags
        n_b = lengths_b.lengths_b.clamp_max(n)
        pseudo_mT = self.places(scores_mT, lengths_b, chance) % n_b[lengths_b.bag_of_T]
        if lengths_b.equal:
            h_gLH = h_mTH.unflatten(1, (n_bags, -1)).flatten(0, 1)
            scores_gL, own_gL, n_sets = scores_mT.reshape(m * n_bags, -1), pseudo_mT.reshape(m * n_bags, -1), n
        else:
            h_gLH, scores_gL, own_gL, n_sets = h_mTH, scores_mT, lengths_b.bag_of_T * n + pseudo_mT, n_bags * n
        inside_gSL = own_gL.unsqueeze(1) == torch.arange(n_sets, device=own_gL.device).unsqueeze(1)
        lowest = torch.finfo(scores_gL.dtype).min  # an empty set's row then has no NaN
        weights_gSL = torch.softmax(scores_gL.unsqueeze(1).masked_fill(~inside_gSL, lowest), dim=2) * inside_gSL
        means_mSH = (weights_gSL @ h_gLH).view(m, n_bags * n, -1)
        logits_mbnC = layer("tier1_head", means_mSH, p).unflatten(1, (n_bags, n))
        real_bn = torch.arange(n, device=own_gL.device) < n_b.unsqueeze(1)
        shares_bn1 = (real_bn / n_b.unsqueeze(1)).unsqueeze(2)
        tier1_mbX = torch.cat([cross_entropy_by_label(logits_mbnC), logits_mbnC], dim=3).mul(shares_bn1).sum(dim=2)
        distilled_mSKH = means_mSH.unsqueeze(2)
        if self.distill != "afs":
            distilled_mSKH = self.chosen(h_gLH, weights_gSL, inside_gSL, p).view(m, n_bags * n, -1, self.hidden)
        flat_mRH, k = distilled_mSKH.flatten(1, 2), distilled_mSKH.shape[2]
        if not self.end_to_end:
            flat_mRH = flat_mRH.detach()
        scores_mbnK = attention_scores("tier2_", flat_mRH, p, self.gated).view(m, n_bags, n, k)
        scores_mbnK = scores_mbnK.masked_fill(~real_bn.unsqueeze(2), -torch.inf)
        shares_mbR = torch.softmax(scores_mbnK.flatten(2), dim=2)
        mean_mbH = (shares_mbR.unsqueeze(2) @ flat_mRH.unflatten(1, (n_bags, n * k))).squeeze(2)
        shares_gS = shares_mbR.unflatten(2, (n, k)).sum(dim=3).view(len(weights_gSL), n_sets)
        tiles_mT = (shares_gS.unsqueeze(1) @ weights_gSL.detach()).detach().view(m, -1)
        return torch.cat([mean_mbH, tier1_mbX], dim=2), tiles_mT

    def places(self, scores_mT: Tensor, lengths_b: Segments, chance: Chance | None) -> Tensor:
        """Each tile's place in its bag, shuffled in training."""
        if chance:
            return chance.shuffled_in_bags(lengths_b, "pseudo-bags", scores_mT.device)
        return lengths_b.place_T.expand_as(scores_mT)

    def chosen(self, h_gLH: Tensor, weights_gSL: Tensor, inside_gSL: Tensor, p: Parameters) -> Tensor:
        """`distilled` tiles of each set, (g, S, K, H)."""
        with torch.no_grad():
            weight_mHC = p["tier1_head_weight"]
            weight_gHC = weight_mHC.repeat_interleave(len(h_gLH) // len(weight_mHC), dim=0)
            activation_gLC = (h_gLH @ weight_gHC) * weights_gSL.sum(dim=1).unsqueeze(2)  # equation 5
            if self.n_outputs > 1:
                activation_gLC = torch.softmax(activation_gLC, dim=2)  # equation 6
            activation_gSLC, outside_gSL1 = activation_gLC.unsqueeze(1), ~inside_gSL.unsqueeze(3)
            rows = [activation_gSLC.masked_fill(outside_gSL1, -torch.inf).argmax(dim=2)]
            if self.distill == "maxmins":
                rows.append(activation_gSLC.masked_fill(outside_gSL1, torch.inf).argmin(dim=2))
            rows_gSK = torch.cat(rows, dim=2)
        return chosen_rows(h_gLH, rows_gSK.flatten(1)).view(*rows_gSK.shape, -1)

    def deal(self, scores_mL: Tensor, chance: Chance | None) -> Tensor:
        """Which pseudo-bag each tile is in, (m, L): 0 to n - 1, of sizes that differ by at most one."""
        m, length = scores_mL.shape
        if chance:
            place_mL = chance.shuffled(length, "pseudo-bags", scores_mL.device)
        else:
            place_mL = torch.arange(length, device=scores_mL.device).expand(m, -1)
        return place_mL % min(self.pseudo_bags, length)

    def weights(self, scores_mL: Tensor, bag_of_mL: Tensor) -> Tensor:
        """Attention within each pseudo-bag, (m, n, L): the weights of its tiles sum to 1, others have 0."""
        n = min(self.pseudo_bags, scores_mL.shape[1])
        inside_mnL = bag_of_mL.unsqueeze(1) == torch.arange(n, device=scores_mL.device).view(1, n, 1)
        return torch.softmax(scores_mL.unsqueeze(1).masked_fill(~inside_mnL, -torch.inf), dim=2)

    def distilled(self, h_mLH: Tensor, weights_mnL: Tensor, means_mnH: Tensor, p: Parameters) -> Tensor:
        """What each pseudo-bag hands on, (m, n, K, H)."""
        if self.distill == "afs":
            return means_mnH.unsqueeze(2)
        with torch.no_grad():  # which tiles they are has no gradient
            activation_mLC = (h_mLH @ p["tier1_head_weight"]) * weights_mnL.sum(dim=1).unsqueeze(2)  # equation 5
            if self.n_outputs > 1:
                activation_mLC = torch.softmax(activation_mLC, dim=2)  # equation 6
            activation_mnLC, outside_mnL1 = activation_mLC.unsqueeze(1), (weights_mnL == 0).unsqueeze(3)
            rows = [activation_mnLC.masked_fill(outside_mnL1, -torch.inf).argmax(dim=2)]
            if self.distill == "maxmins":
                rows.append(activation_mnLC.masked_fill(outside_mnL1, torch.inf).argmin(dim=2))
            rows_mnK = torch.cat(rows, dim=2)
        flat_mR1 = rows_mnK.flatten(1).unsqueeze(2)
        kept_mLH: Tensor = h_mLH.gather(1, flat_mR1.expand(-1, -1, h_mLH.shape[2])).unflatten(1, rows_mnK.shape[1:])
        return kept_mLH

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return self.linear("head0", pooled_MBP[..., : self.hidden])

    def losses(self, prediction: Prediction, labels: Tensor) -> Tensor:
        assert prediction.pooled_MBP is not None
        bag_MB = cross_entropy(prediction.logits_MBC.float(), labels)
        return bag_MB + of_label(prediction.pooled_MBP[..., self.hidden :].float(), labels)

    def readings(self, prediction: Prediction) -> list[tuple[float, Tensor]]:
        """The bag's, and the mean of its pseudo-bags', which is what the first tier then learns from."""
        assert prediction.pooled_MBP is not None
        tier1_MBC = self.with_cuts(prediction.pooled_MBP[..., -self.n_outputs :])
        return [(1.0, prediction.logits_MBC), (1.0, tier1_MBC)]
