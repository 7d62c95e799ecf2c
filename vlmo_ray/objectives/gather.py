"""All collectives of the objectives, in one place.

Every worker has a contiguous run of the global batch (`data.order.deal`), so joining the workers' rows in rank order
gives positions 0 .. N-1 for any number of workers. Without a process group there is one worker, and nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """Which worker holds which rows of one global batch: worker r holds `counts[r]` rows, after those of r - 1."""

    counts: tuple[int, ...]
    rank: int = 0

    @property
    def size(self) -> int:
        return len(self.counts)

    @property
    def first(self) -> int:
        """The position of this worker's first row."""
        return sum(self.counts[: self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """Local rows `[b, ...]` of every worker, joined to `[N, ...]` in position order; carries no gradient."""
        rows = rows.detach()
        assert len(rows) == self.counts[self.rank], (len(rows), self.counts, self.rank)
        if self.size == 1:
            return rows
        if rows.dtype == torch.bool:
            return self.gather(rows.to(torch.uint8)).bool()
        longest = max(self.counts)  # gloo and the fast NCCL path need equal sizes: pad, then cut
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        joined = rows.new_empty((self.size * longest, *rows.shape[1:]))
        # from torch 2.14 on, which warns of the old name
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(joined, padded)
        if all(count == longest for count in self.counts):
            return joined
        by_rank = joined.view(self.size, longest, *rows.shape[1:])
        return torch.cat([by_rank[r, :count] for r, count in enumerate(self.counts)])

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over the workers; carries no gradient."""
        values = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def fetch(self, rows: Tensor, wanted: Tensor) -> tuple[Tensor, int]:
        """Fetches rows of the global batch by position. Only wanted rows travel, each at most once per worker.

        `rows` is this worker's `[b, ...]`. `wanted` holds the positions `[N]` that the rows of *all* workers ask for;
        because it was gathered, every worker knows what to send. Returns this worker's `[b, ...]` in the order of its
        own wanted positions, and the bytes received from other workers.
        """
        mine = slice(self.first, self.first + self.counts[self.rank])
        if self.size == 1:
            return rows[wanted], 0
        starts = [sum(self.counts[:r]) for r in range(self.size + 1)]
        asked = wanted.cpu().contiguous()  # the one host sync of the exchange: its sizes
        owner = torch.bucketize(asked, torch.tensor(starts[1:]), right=True)
        send, send_counts = [], []
        for r in range(self.size):
            theirs = asked[starts[r] : starts[r + 1]]
            from_me = theirs[owner[starts[r] : starts[r + 1]] == self.rank].unique()
            if r == self.rank:
                from_me = from_me[:0]  # own rows are not sent
            send.append(from_me - self.first)
            send_counts.append(len(from_me))
        needed = asked[mine].unique()
        remote = needed[(needed < self.first) | (needed >= self.first + len(rows))]
        receive_owner = torch.bucketize(remote, torch.tensor(starts[1:]), right=True)
        receive_counts = torch.bincount(receive_owner, minlength=self.size).tolist()
        outgoing = rows[torch.cat(send).to(rows.device)]
        incoming = rows.new_empty((len(remote), *rows.shape[1:]))
        dist.all_to_all_single(incoming, outgoing, receive_counts, send_counts)
        # the index of each wanted row in [own rows; received rows]; `remote` is sorted, and so are the received rows
        local = (asked[mine] >= self.first) & (asked[mine] < self.first + len(rows))
        place = torch.where(local, asked[mine] - self.first, len(rows) + torch.searchsorted(remote, asked[mine]))
        pool = torch.cat([rows, incoming])
        return pool[place.to(rows.device)], incoming.numel() * incoming.element_size()
