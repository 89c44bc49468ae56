"""What every family of operations does to channel identities; importing this package enters all rules."""

from hfprune.structure.rules import contraction, convolution, joining, movement, reduction  # noqa: F401
