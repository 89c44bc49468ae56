"""Structure: which dimensions of a model's tensors go together, and how they are physically removed.

graph (export) · identities (what an element belongs to) · rules (one a family of operations) · coupling (the walk) ·
groups · costs · surgery · attributes · proof · blocks · targets · plan.
"""
