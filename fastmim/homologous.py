"""Attention among the images of a mixture: who may see whom, and how much of it stays within an image.

Which image a patch is of is `src` (G, L), as `fastmim_kernels.partition` gives it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmim.blocks import Attend


def own_image_bias(src: Tensor, classes: int, num_prefix: int) -> Tensor:
    """(G, 1, P + L, P + L) for the scores: -inf between tokens of different images, 0 elsewhere.

    Args:
        src: (G, L) the image of each patch.
        classes: prefix tokens that are of one image each, in the order of the images; 0: the prefix is of all images.
        num_prefix: P.
    """
    owner = torch.cat([torch.arange(classes, device=src.device).expand(len(src), -1), src], dim=1)
    is_foreign = owner[:, None, :, None] != owner[:, None, None, :]
    bias = torch.zeros(is_foreign.shape, device=src.device).masked_fill_(is_foreign, -torch.inf)
    shared = num_prefix - classes
    return F.pad(bias, (shared, 0, shared, 0))


def attend_apart(q: Tensor, k: Tensor, v: Tensor, topk: int) -> Tensor:
    """Class tokens of one image each attend to themselves and to the patches that they rate highest.

    Args:
        q: (G, heads, M, d) queries of the class tokens.
        k, v: (G, heads, M + L, d) of all tokens, class tokens first.
        topk: patch keys that each keeps, and all that tie with the last.
    """
    count, work = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.to(work) * q.shape[3] ** -0.5) @ k.to(work).transpose(2, 3)
        best = scores.detach()[..., count:].topk(topk, dim=-1, sorted=False).values
        is_dropped = scores < best.amin(-1, keepdim=True)
        is_dropped[..., :count] = ~torch.eye(count, dtype=torch.bool, device=q.device)
        return scores.masked_fill(is_dropped, -torch.inf).softmax(-1).to(v.dtype) @ v


@torch.no_grad()
def own_share(attend: Attend, q: Tensor, k: Tensor, src: Tensor, members: int, num_prefix: int) -> Tensor:
    """Of the attention that patches pay to patches, the share that stays within their image; mean over queries and heads.

    Args:
        attend: (G, heads, P + L, d) queries, keys and values -> (G, heads, P + L, d).
        src: (G, L) the image of each patch, 0 .. members - 1.
    """
    # Values that mark the image of a key: what attention makes of them is how much is paid to each image.
    marks = (src.unsqueeze(-1) == torch.arange(members, device=src.device)).to(q.dtype)
    marks = F.pad(marks, (0, -members % q.shape[3], num_prefix, 0)).unsqueeze(1)
    paid = torch.cat([attend(q, k, part.expand_as(q)) for part in marks.split(q.shape[3], dim=-1)], dim=-1)
    paid = paid[:, :, num_prefix:].float()
    own = paid.gather(-1, src[:, None, :, None].expand(-1, q.shape[1], -1, -1)).squeeze(-1)
    return (own / paid.sum(-1)).mean()


def without_class_token(attend: Attend) -> Attend:
    """Patches attend to patches alone, the class token to itself."""

    def among_patches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([v[:, :, :1], attend(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])], dim=2)

    return among_patches
