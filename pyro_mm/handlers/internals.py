"""Private names of torch that other folders use, under public names.

``tests/handlers/test_internals.py`` states what is relied on of each, here and in the other modules of this folder.
"""

from torch import _foreach_copy_ as foreach_copy_
from torch import _foreach_mul_ as foreach_multiply_
from torch import _foreach_norm as foreach_norm
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves

__all__ = [
    "BatchNorm", "TorchDispatchMode", "foreach_copy_", "foreach_multiply_", "foreach_norm", "tree_iter",
    "tree_leaves",
]  # fmt: skip
