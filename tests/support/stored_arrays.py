"""Arrays that are read by rows, and count what is read."""

import numpy as np


class RowsOnly:
    """An array of which slices of rows are read, as of a library that nobody here knows.

    Attributes:
        most: the most rows that were read at once.
        rows: the rows that were read in all.
    """

    def __init__(self, values):
        self._values = np.asarray(values)
        self.shape = self._values.shape
        self.dtype = self._values.dtype
        self.most = 0
        self.rows = 0

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        found = self._values[rows]
        self.most = max(self.most, len(found))
        self.rows += len(found)
        return found
