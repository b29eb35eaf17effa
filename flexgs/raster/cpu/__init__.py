"""The CPU backend of render(): numba kernels, the threads that run them, and their gradients in torch."""
