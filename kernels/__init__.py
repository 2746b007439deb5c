"""Triton kernels of diffseg, installed as ``diffseg.kernels``."""
