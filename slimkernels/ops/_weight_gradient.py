"""How ``linear_slim_loss`` sums the gradient of the lm_head's weight over chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

# Vocabulary entries whose gradient one matrix product makes: enough of them to be at its full rate.
_PANELS = {"cpu": 1024, "cuda": 16384}


class WeightGradient:
    """``dweight = dlogits.T @ hidden``, summed over chunks of rows in no more memory than ``dweight`` has.

    A product sums in float32 and rounds once, so in half precision it should see as many rows as possible. ``dweight``
    (V, D) itself has room for the dlogits of D rows: each chunk is parked at its end, panel by panel of the vocabulary,
    and the products, which fill it from its start, reach a panel's room only after that panel was taken out. More than
    D rows go through in rounds, whose products are summed in float32.
    """

    def __init__(self, dweight: Tensor, hidden: Tensor, chunk_rows: int) -> None:
        num_rows, hidden_size = hidden.shape
        self._dweight, self._hidden = dweight, hidden
        self._parks = dweight.dtype in (torch.bfloat16, torch.float16)
        self._round_rows = max(hidden_size // chunk_rows, 1) * chunk_rows
        several = self._parks and num_rows > self._round_rows
        self._total = torch.empty_like(dweight, dtype=torch.float32) if several else dweight

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """Takes the dlogits (rows, V) of the next chunk; they may be overwritten afterwards."""
        hidden, first = self._hidden, rows.start == 0
        if not self._parks:
            torch.addmm(self._dweight, dlogits.t(), hidden[rows], beta=0 if first else 1, out=self._dweight)
            return
        begin = rows.start // self._round_rows * self._round_rows
        end = min(begin + self._round_rows, hidden.shape[0])
        alone = rows == slice(begin, end)
        for vocab in self._panels():
            panel = dlogits[:, vocab]
            if not alone:
                parked = self._parked(vocab, end - begin)
                parked[rows.start - begin : rows.stop - begin] = panel
                if rows.stop < end:
                    continue
                panel = parked.clone()  # the product overwrites where it was
            self._multiply(vocab, panel.t(), hidden[begin:end], first=begin == 0)

    def finish(self) -> None:
        """Leaves the sum in ``dweight``."""
        if self._hidden.shape[0] == 0:
            self._dweight.zero_()
        elif self._total is not self._dweight:
            self._dweight.copy_(self._total)

    def _panels(self) -> list[slice]:
        vocab_size = self._dweight.shape[0]
        panel = _PANELS[self._dweight.device.type]
        return [slice(v, min(v + panel, vocab_size)) for v in range(0, vocab_size, panel)]

    def _parked(self, vocab: slice, num_rows: int) -> Tensor:
        """Where the dlogits (num_rows, panel) of a panel are kept until every chunk of the round was seen."""
        vocab_size, hidden_size = self._dweight.shape
        begin = vocab_size * (hidden_size - num_rows) + vocab.start * num_rows
        length = (vocab.stop - vocab.start) * num_rows
        return self._dweight.view(-1)[begin : begin + length].view(num_rows, -1)

    def _multiply(self, vocab: slice, dlogits_t: Tensor, hidden: Tensor, first: bool) -> None:
        total = self._total[vocab]
        if self._total is self._dweight:
            torch.mm(dlogits_t, hidden, out=total)
        elif total.device.type == "cuda":
            # cuBLAS adds the float32 product to the float32 sum; torch's CPU products have no such form.
            torch.addmm(total, dlogits_t, hidden, beta=0 if first else 1, out_dtype=torch.float32, out=total)
        elif first:
            total.copy_(torch.mm(dlogits_t, hidden))
        else:
            total += torch.mm(dlogits_t, hidden)
