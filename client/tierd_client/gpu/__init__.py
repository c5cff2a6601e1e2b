"""GPU memory that the daemon shares: mapped chunk by chunk, seen as tensors. Imports no CUDA."""
