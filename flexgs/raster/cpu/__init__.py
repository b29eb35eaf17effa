"""The CPU backend of render(): numba kernels, and their gradients in torch."""
