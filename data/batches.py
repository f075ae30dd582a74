"""From texts to batches: token ids in one table, and batches of texts of similar length.

Padding is a small BERT's greatest waste: the sentences of SST-2 have 13 tokens on average, and the
longest text of a batch sets the length of all.
"""

import math

import numpy as np
import torch

from data.text import WordPieceTokenizer


class Examples:
    """Token ids of all texts, one row per text, so that a batch is a selection of rows.

    rows: each one (text, second text or None, label).
    max_length: the largest number of tokens; longer texts are cut.
    """

    def __init__(self, rows, tokenizer: WordPieceTokenizer, max_length=128):
        ids = np.full((len(rows), max_length), tokenizer.vocab["[PAD]"], dtype=np.int32)
        lengths = np.zeros((2, len(rows)), dtype=np.int64)
        for i, (text, pair, _) in enumerate(rows):
            tokens, segments = tokenizer.encode(text, pair, max_length)
            ids[i, :len(tokens)] = tokens
            lengths[:, i] = len(tokens), segments.count(0)
        self.ids = torch.from_numpy(ids)
        self.lengths, self.firsts = torch.from_numpy(lengths)  # firsts: tokens of segment 0
        self.labels = torch.tensor([label for *_, label in rows])

    def collate(self, rows):
        """ids, segments, mask (N, T) and labels (N,) of these rows; T is the length of the longest.

        On CUDA T is the next multiple of 8: few shapes occur, and each is recorded once.
        """
        longest = int(self.lengths[rows].max())
        if torch.cuda.is_available():
            longest = min(math.ceil(longest / 8) * 8, self.ids.shape[1])
        position = torch.arange(longest)
        mask = position < self.lengths[rows, None]
        segments = mask & (position >= self.firsts[rows, None])
        return self.ids[rows, :longest], segments.int(), mask, self.labels[rows]

    def batches(self, size, seed, epoch):
        """A DataLoader of all rows in random order, but of similar length in a batch: the rows of
        50 batches at a time are sorted by length and cut into batches, which are shuffled, too."""
        random = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(self.labels), generator=random)
        groups = []
        for pool in order.split(50 * size):
            groups += pool[self.lengths[pool].argsort(stable=True)].split(size)
        groups = [groups[i] for i in torch.randperm(len(groups), generator=random)]
        return torch.utils.data.DataLoader(groups, None, collate_fn=self.collate, generator=random)
