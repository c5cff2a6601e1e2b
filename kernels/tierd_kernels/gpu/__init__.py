"""Triton kernels: one source for every codec, as functions of a tile.

Needs torch and triton, which `tierd_kernels` itself does not import. Whether kernels are compiled
or interpreted is decided when they are first imported, by TRITON_INTERPRET.
"""
