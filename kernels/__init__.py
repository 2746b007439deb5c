"""Triton kernels of diffseg, installed as ``diffseg.kernels``: the ops of the backend ``"triton"``.

Triton is imported with the modules here, never with this package.
"""
