"""What executes a network: `base` says what an engine is, `registry` lists them, `autoselect` which is fastest here.

Nothing here measures, trains or reads checkpoints; kernels are in skipnet_rt.kernels and csrc/.
"""
