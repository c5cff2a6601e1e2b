"""`cupy` of a process that has tests/fake_cuda/site on its PYTHONPATH: CUDA IPC alone."""
