"""Fused operators of the STC connector: one operator a file, beside its plain reference.

None stands here yet; `vla2_models.stc` runs on PyTorch's own operators.
"""
