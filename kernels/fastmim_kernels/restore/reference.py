"""Restore by writing: the result starts as mask token + position everywhere, and each token of x overwrites one row.

Every row is written once, so that the gradient of x is a gather of rows. The textbook form (append mask tokens, gather
by ids_restore) needs a scatter-add of all L rows instead; here only a trained ``pos`` needs one, of K rows.
"""

import torch
from torch import Tensor


def restore_tokens(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int = 1) -> Tensor:
    """See the public function."""
    batch, tokens, _ = x.shape
    count = ids_restore.shape[1]
    dtype = torch.promote_types(torch.promote_types(x.dtype, mask_token.dtype), pos.dtype)
    work = torch.promote_types(dtype, torch.float32)
    x, mask_token, pos = x.to(work), mask_token.to(work), pos.to(work)

    places = torch.arange(count, device=x.device).expand(batch, -1)
    # The inverse permutation: ids_keep, then ids_masked.
    order = torch.empty_like(ids_restore).scatter_(1, ids_restore, places)
    prefix = torch.arange(num_prefix, device=x.device).expand(batch, -1)
    # Where each token of x goes, (B, P + K).
    rows = torch.cat([prefix, num_prefix + order[:, : tokens - num_prefix]], dim=1)

    unseen = torch.cat([pos[:num_prefix], pos[num_prefix:] + mask_token])
    image = torch.arange(batch, device=x.device)[:, None]
    return unseen.expand(batch, -1, -1).index_put((image, rows), x + pos[rows]).to(dtype)
