"""The gradients of hidden states and of the lm_head, summed over chunks of rows of the logits' gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.ops._library import accumulation_dtype

# Vocabulary entries whose gradient one matrix product makes, enough for the product to reach its full rate.
_PANELS = {"cpu": 1024, "cuda": 16384}
# Whether one product makes the whole of a round whose rows are one chunk, which needs no room. On a CPU the product
# would copy the transposed logits, so there it is made in panels, too.
_WHOLE_ROUNDS = {"cpu": False, "cuda": True}


class HeadGradients:
    """The gradients ``dhidden = dlogits @ weight``, ``dweight = dlogits.T @ hidden`` and ``dbias = dlogits.sum(0)``.

    Args:
        dhidden: (N, D) to write to; None if it is not needed.
        dweight: (V, D) to write to; None if it is not needed.
        dbias: (V,) to write to; None if it is not needed.
        hidden: (N, D) hidden states.
        weight: (V, D) weight of the lm_head.
        ignored: (N,) bool, the rows that the loss ignores.
        chunk_rows: Number of rows of every chunk but the last.
    """

    def __init__(
        self,
        dhidden: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        *,
        hidden: Tensor,
        weight: Tensor,
        ignored: Tensor,
        chunk_rows: int,
    ) -> None:
        self._dhidden, self._dbias, self._weight = dhidden, dbias, weight
        self._dweight = None if dweight is None else _WeightGradient(dweight, hidden, ignored, chunk_rows)
        self._dbias_sum = None if dbias is None else torch.zeros_like(dbias, dtype=accumulation_dtype(dbias.dtype))

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """Adds the dlogits (rows, V) of the next chunk, which may be overwritten afterwards."""
        if self._dhidden is not None:
            torch.mm(dlogits, self._weight, out=self._dhidden[rows])
        if self._dweight is not None:
            self._dweight.add(rows, dlogits)
        if self._dbias_sum is not None:
            self._dbias_sum += dlogits.sum(0, dtype=self._dbias_sum.dtype)

    def finish(self) -> None:
        """Rounds the sums into ``dweight`` and ``dbias``."""
        if self._dweight is not None:
            self._dweight.finish()
        if self._dbias is not None and self._dbias_sum is not None:
            self._dbias.copy_(self._dbias_sum)


class _WeightGradient:
    """The sum ``dweight = dlogits.T @ hidden`` over chunks of rows, in no more memory than ``dweight`` itself has.

    A product sums in float32 and rounds once, so in half precision it should cover as many rows as possible.
    ``dweight`` (V, D) has room for the dlogits of D rows, which are parked in it: each chunk is copied to the end of
    ``dweight``, one panel of the vocabulary after the other. The products fill ``dweight`` from its start and reach
    the room of a panel only after that panel was copied out. More than D rows take several rounds, whose products are
    summed in float32.

    Rows that the loss ignores have dlogits of 0. Their hidden states count as 0 too, because 0 * NaN is NaN.
    """

    def __init__(self, dweight: Tensor, hidden: Tensor, ignored: Tensor, chunk_rows: int) -> None:
        num_rows, hidden_size = hidden.shape
        self._dweight, self._hidden = dweight, hidden
        # Looking whether there are any would need a synchronisation on CUDA.
        has_ignored = hidden.device.type != "cpu" or bool(ignored.any())
        self._ignored = ignored.unsqueeze(1) if has_ignored else None
        self._parks = dweight.dtype in (torch.bfloat16, torch.float16)
        self._round_rows = max(hidden_size // chunk_rows, 1) * chunk_rows
        takes_several_rounds = self._parks and num_rows > self._round_rows
        self._total = torch.empty_like(dweight, dtype=torch.float32) if takes_several_rounds else dweight

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """Adds the dlogits (rows, V) of the next chunk, which may be overwritten afterwards."""
        is_first = rows.start == 0
        if not self._parks:
            torch.addmm(self._dweight, dlogits.t(), self._counted(rows), beta=0 if is_first else 1, out=self._dweight)
            return
        begin = rows.start // self._round_rows * self._round_rows
        end = min(begin + self._round_rows, self._hidden.shape[0])
        is_whole_round = rows == slice(begin, end)
        ends_round = rows.stop == end
        hidden = self._counted(slice(begin, end)) if ends_round else self._hidden
        whole = is_whole_round and _WHOLE_ROUNDS[dlogits.device.type]
        for vocab in [slice(0, self._dweight.shape[0])] if whole else self._panels():
            panel = dlogits[:, vocab]
            if not is_whole_round:
                parked = self._parked(vocab, end - begin)
                parked[rows.start - begin : rows.stop - begin] = panel
                if not ends_round:
                    continue
                # The product may overwrite the room where the panel was parked.
                panel = parked.clone()
            self._multiply(vocab, panel.t(), hidden, is_first=begin == 0)

    def finish(self) -> None:
        """Rounds the sum into ``dweight`` where it is kept elsewhere."""
        if self._hidden.shape[0] == 0:
            self._dweight.zero_()
        elif self._total is not self._dweight:
            self._dweight.copy_(self._total)

    def _counted(self, rows: slice) -> Tensor:
        """Returns the hidden states of some rows, 0 where a row is ignored."""
        return self._hidden[rows] if self._ignored is None else self._hidden[rows].masked_fill(self._ignored[rows], 0)

    def _panels(self) -> list[slice]:
        vocab_size = self._dweight.shape[0]
        panel = _PANELS[self._dweight.device.type]
        return [slice(v, min(v + panel, vocab_size)) for v in range(0, vocab_size, panel)]

    def _parked(self, vocab: slice, num_rows: int) -> Tensor:
        """Returns the room for a panel's dlogits (num_rows, panel), kept until every chunk of the round was added."""
        vocab_size, hidden_size = self._dweight.shape
        begin = vocab_size * (hidden_size - num_rows) + vocab.start * num_rows
        length = (vocab.stop - vocab.start) * num_rows
        return self._dweight.view(-1)[begin : begin + length].view(num_rows, -1)

    def _multiply(self, vocab: slice, dlogits_t: Tensor, hidden: Tensor, is_first: bool) -> None:
        total = self._total[vocab]
        if self._total is self._dweight:
            torch.mm(dlogits_t, hidden, out=total)
        elif total.device.type == "cuda":
            # cuBLAS adds the float32 product to the float32 sum; torch's CPU products have no such form.
            torch.addmm(total, dlogits_t, hidden, beta=0 if is_first else 1, out_dtype=torch.float32, out=total)
        elif is_first:
            total.copy_(torch.mm(dlogits_t, hidden))
        else:
            total += torch.mm(dlogits_t, hidden)
