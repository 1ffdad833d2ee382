"""LLaDA's draft forward for a handful of rows: what `LladaForMaskedDiffusion.draft_hidden_states` and the head compute.

That is the plain version, which this one is tested against. Here, per call: one copy to the device; per layer four
products (q, k and v are one, gate and up are one) in the way that is fastest on this device (`products.py`), no padding
rows, keys and values written and read by one operation each; then the head over the tokens that can be drafted, and its
argmax. Query heads that share a key head are rows of one product, so keys are never repeated. With a sequential head
(`student/model/sequential_head.py`) the argmax goes from left to right, each corrected by the token before: a look-up
and a product of r x S a position. Beside each token stands its probability, the student's confidence in it.

More denoising steps fix some tokens of the block, mask the others again and choose these once more: forwards over the
block alone, whose contexts are cached.

Under tensor parallelism (`parallel.py`) each rank has some heads, some of the MLP's width and a range of the
vocabulary; it adds up after attention, MLP and embedding, and the argmax is that of all ranks' best tokens.

Legend: B requests, G block length, N tokens of all requests, L of the longest row, T keys, D width, F MLP width, H
query heads, K key heads, A = H + 2K, E head width, S tokens that can be drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from shared.config.speculate import Way
from shared.errors import CheckpointError
from student.drafting.denoising import Denoising
from student.drafting.products import Linear, activation_dtype, fused, local, of_weight, separate
from student.model.modeling_llada import LladaForMaskedDiffusion, rotary_tables
from student.model.prefix_cache import DraftStep, PrefixCache, page_bytes
from student.model.sequential_head import SequentialHead

_TABLE_ROWS = 8192  # of the embedding at a time, whose norms are a copy of it


@dataclass(frozen=True, slots=True)
class _Layer:
    attn_norm: Tensor
    qkv: Linear
    attn_out: Linear
    ff_norm: Tensor
    gate_up: Linear
    ff_out: Linear


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The sequential head in tables: what a drafted token adds, what a state adds, and logits of their sum."""

    previous_VxR: Tensor
    state: Linear
    out: Linear


class DraftForward:
    """The argmax of a masked block after each request's context.

    Args:
        model: on its device; weights may be shared out by `parallel.shard`.
        draftable: int64 [S], ascending: student ids that may be drafted.
        way: how products are computed (`products.fastest_way`); null reads the modules of a model that is in training,
            in its own type, and leaves their weights where they are.
        max_tokens: longest context, block included.
        group: that shares the weights out.
        denoising: how a block is filled; null is one step.

    Raises:
        CheckpointError: if `draftable` has ids that the model has no rows for.
    """

    def __init__(
        self,
        model: LladaForMaskedDiffusion,
        draftable: NDArray[np.int64],
        way: Way | None,
        max_tokens: int,
        group: ProcessGroup | None = None,
        denoising: Denoising | None = None,
    ) -> None:
        self.denoising = denoising or Denoising()
        self.config, self.max_tokens, self.group = model.config, max_tokens, group
        rows = model.head_weight.shape[0]
        if draftable.max() >= rows:
            raise CheckpointError(
                f"the student's tokenizer has the id {draftable.max()} but its model only {rows} rows; "
                "they are not of one checkpoint"
            )
        transformer = model.model.transformer
        table = local(transformer["wte"].weight).detach()
        head = local(model.head_weight).detach()
        self.device = table.device
        self.dtype = table.dtype if way is None else activation_dtype(way)
        self._table = table.to(self.dtype)
        self._first_row = 0
        if group is not None:
            rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
            self._first_row = rank * -(-rows // size)  # as torch.chunk shares rows out
        mine = draftable[(draftable >= self._first_row) & (draftable < self._first_row + len(head))]
        self._draftable_S = torch.from_numpy(mine).to(self.device)
        head_SxD = head.index_select(0, self._draftable_S - self._first_row)
        self._head = of_weight(way, head_SxD)

        def product(*modules: nn.Module) -> Linear:
            return separate(modules) if way is None else fused(way, modules)

        def norm(module: nn.Module) -> Tensor:
            weight: Tensor = module.get_parameter("weight")
            return weight if way is None else weight.detach().to(self.dtype)

        self._layers = [
            _Layer(
                norm(block.attn_norm),
                product(block.q_proj, block.k_proj, block.v_proj),
                product(block.attn_out),
                norm(block.ff_norm),
                product(block.ff_proj, block.up_proj),
                product(block.ff_out),
            )
            for block in transformer["blocks"]
        ]
        self._last_norm = norm(transformer["ln_f"])
        self._pairs = None if model.sequential_head is None else _pairs(model.sequential_head, table, head_SxD, way)
        # Numbers of their own: every read of a config's attribute takes microseconds.
        config = self.config
        self._width, self._eps, self._mask_id = config.head_dim, config.rms_norm_eps, config.mask_token_id
        block = transformer["blocks"][0]
        self.kv_heads, self._heads = (
            local(projection.weight).shape[0] // self._width for projection in (block.k_proj, block.q_proj)
        )
        self._attention_is_shared = self._heads < self.config.n_heads
        cos, sin = rotary_tables(self.config, torch.arange(max_tokens, device=self.device)[None])
        # x cos + rotate_half(x) sin, with rotate_half a roll by half and its minus sign in the sines.
        sign = torch.ones(self._width, device=self.device)
        sign[: self._width // 2] = -1
        self._cos_sin = torch.stack((cos[0, 0], sin[0, 0] * sign), dim=1)[:, :, None]  # positions x 2 x 1 x E

    @property
    def page_bytes(self) -> int:
        """Of a page of the cache on this rank."""
        return page_bytes(self.config, self.dtype, self.kv_heads)

    def cache(self, pages: int) -> PrefixCache:
        """An empty cache of so many pages."""
        return PrefixCache(self.config, pages, self.dtype, self.device, self.kv_heads)

    @torch.inference_mode()
    def __call__(
        self,
        cache: PrefixCache,
        slots: Sequence[int],
        new_ids: Sequence[NDArray[np.integer]],
        block_length: int,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Append `new_ids` to the requests in `slots` and fill their blocks.

        Returns:
            The token at every place of every block, [B][G], and its probability among the tokens that can be drafted,
            given the block's tokens before it where there is a sequential head.

        Raises:
            ValueError: if the tokens do not fit into the cache.
        """
        step = cache.begin(slots, [len(ids) for ids in new_ids], block_length, self.max_tokens)
        masks = np.full(block_length, self._mask_id, np.int64)
        ids_N = torch.from_numpy(np.concatenate([part for ids in new_ids for part in (ids, masks)]).astype(np.int64))
        filled_2xBxG = self._best(self._block(ids_N.to(self.device, non_blocking=True), step))
        cache.commit(step)
        fixed_BG = torch.zeros_like(filled_2xBxG[0], dtype=torch.bool)
        for count in self.denoising.fixed(block_length):
            fixed_BG = self.denoising.choose(count, filled_2xBxG[1], fixed_BG)
            step = cache.begin(slots, [0] * len(slots), block_length, self.max_tokens)
            ids_BG = filled_2xBxG[0].long().masked_fill(~fixed_BG, self._mask_id)
            again_2xBxG = self._best(self._block(ids_BG.flatten(), step), filled_2xBxG, fixed_BG)
            filled_2xBxG = torch.where(fixed_BG, filled_2xBxG, again_2xBxG)
        ids, chances = filled_2xBxG.tolist()
        return [[int(index) for index in row] for row in ids], chances

    def _block(self, ids_N: Tensor, step: DraftStep) -> Tensor:
        """BxGxD: the normed last states of the blocks."""
        return self._normed(self._run(ids_N, step)[step.block_BG], self._last_norm)

    def _run(self, ids_N: Tensor, step: DraftStep) -> Tensor:
        groups = self._heads // self.kv_heads
        x_NxD = self._lookup(ids_N, self._table)
        cos_Nx1xE, sin_Nx1xE = self._cos_sin[step.positions_N].unbind(1)
        mask = torch.zeros((), dtype=self.dtype, device=self.device).masked_fill(~step.mask_BxLxT(), -torch.inf)
        mask_Bx1xRxT = mask.repeat(1, groups, 1)[:, None]
        for number, layer in enumerate(self._layers):
            qkv_NxAxE = layer.qkv(self._normed(x_NxD, layer.attn_norm)).view(len(x_NxD), -1, self._width)
            turned = qkv_NxAxE[:, : self._heads + self.kv_heads]
            rolled = turned.roll(self._width // 2, -1)
            turned.copy_(torch.addcmul(turned * cos_Nx1xE, rolled, sin_Nx1xE))
            step.write(number, qkv_NxAxE[:, self._heads :].unflatten(1, (2, -1)))
            seen_NxD = self._attend(qkv_NxAxE[:, : self._heads], step.read(number), mask_Bx1xRxT, step)
            x_NxD = x_NxD + self._sum(layer.attn_out(seen_NxD), self._attention_is_shared)
            gate_NxF, up_NxF = layer.gate_up(self._normed(x_NxD, layer.ff_norm)).chunk(2, dim=-1)
            x_NxD = x_NxD + self._sum(layer.ff_out(F.silu(gate_NxF).mul_(up_NxF)))
        return x_NxD

    def _attend(self, q_NxHxE: Tensor, kv_BxTx2xKxE: Tensor, mask_Bx1xRxT: Tensor, step: DraftStep) -> Tensor:
        """Attention of every token, NxD. R = H / K x L: the query heads of one key head, one after the other."""
        batch, longest = step.padded_BL.shape
        groups = self._heads // self.kv_heads
        if step.is_ragged:
            q_NxHxE = q_NxHxE[step.padded_BL.flatten()]
        q_BxKxRxE = q_NxHxE.reshape(batch, longest, self.kv_heads, groups, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k_BxKxTxE, v_BxKxTxE = kv_BxTx2xKxE.permute(2, 0, 3, 1, 4)
        out_BxKxRxE = F.scaled_dot_product_attention(q_BxKxRxE, k_BxKxTxE, v_BxKxTxE, attn_mask=mask_Bx1xRxT)
        out_BxLxD = out_BxKxRxE.unflatten(2, (groups, longest)).permute(0, 3, 1, 2, 4).flatten(2)
        out = out_BxLxD.flatten(0, 1)
        return out[step.unpadded_N] if step.is_ragged else out

    def _normed(self, x_NxD: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x_NxD, weight.shape, weight, self._eps)

    def _lookup(self, ids_N: Tensor, table: Tensor) -> Tensor:
        """Rows of a table, of which each rank has those of its range of the vocabulary."""
        if self.group is None:
            return F.embedding(ids_N, table)
        row_N = ids_N - self._first_row
        is_mine_N = (row_N >= 0) & (row_N < len(table))
        return self._sum(F.embedding(row_N * is_mine_N, table) * is_mine_N[:, None])

    def _sum(self, part: Tensor, is_shared: bool = True) -> Tensor:
        """The sum over ranks of what each of them has computed in part."""
        if self.group is not None and is_shared:
            torch.distributed.all_reduce(part, group=self.group)
        return part

    def _best(self, hidden_BxGxD: Tensor, filled_2xBxG: Tensor | None = None, fixed_BG: Tensor | None = None) -> Tensor:
        """[2, B, G], float64: at every position the token with the largest logit (0) and its probability (1).

        Args:
            filled_2xBxG: of the step before, of which the tokens in `fixed_BG` stay what they are.
        """
        logits_BxGxS = self._head(hidden_BxGxD)
        if self._pairs is None:
            return self._argmax(logits_BxGxS)
        state_BxGxR = self._pairs.state(hidden_BxGxD)
        drafted = [self._argmax(logits_BxGxS[:, 0])]
        for depth in range(1, logits_BxGxS.shape[1]):
            before_B = drafted[-1][0]
            if filled_2xBxG is not None and fixed_BG is not None:
                before_B = torch.where(fixed_BG[:, depth - 1], filled_2xBxG[0, :, depth - 1], before_B)
            before_BxR = self._lookup(before_B.long(), self._pairs.previous_VxR)
            correction_BxS = self._pairs.out(F.silu(before_BxR + state_BxGxR[:, depth]))
            drafted.append(self._argmax(logits_BxGxS[:, depth] + correction_BxS))
        return torch.stack(drafted, dim=-1)

    def _argmax(self, logits: Tensor) -> Tensor:
        """[2, ...], float64: the draftable token with the largest of [..., S] logits, the lowest of equal ones, and its
        probability."""
        if self.group is None:
            best, index = logits.max(-1)
            total = logits.float().logsumexp(-1)
            return torch.stack((self._draftable_S[index].double(), (best.double() - total).exp()))
        if len(self._draftable_S):
            best, index = logits.double().max(-1)
            mine = torch.stack((best, self._draftable_S[index].double(), logits.double().logsumexp(-1)), dim=-1)
        else:
            mine = torch.full((*logits.shape[:-1], 3), -torch.inf, dtype=torch.float64, device=self.device)
        all_ranks = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(self.group))]
        torch.distributed.all_gather(all_ranks, mine, group=self.group)
        best_of_rank, id_of_rank, total_of_rank = torch.stack(all_ranks).unbind(-1)
        best, rank = best_of_rank.max(0)
        return torch.stack((id_of_rank.gather(0, rank[None])[0], (best - total_of_rank.logsumexp(0)).exp()))


@torch.no_grad()
def _pairs(own: SequentialHead, table_VxD: Tensor, head_SxD: Tensor, way: Way | None) -> _Pairs:
    dtype = table_VxD.dtype if way is None else activation_dtype(way)
    of_parts = [own.of_previous(part.to(own.previous.weight.dtype)) for part in table_VxD.split(_TABLE_ROWS)]
    weight_SxR = head_SxD.to(own.out.weight.dtype) @ own.out.weight
    state = own.state if way is None else fused(way, [own.state])
    return _Pairs(torch.cat(of_parts).to(dtype), state, of_weight(way, weight_SxR))
