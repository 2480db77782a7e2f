"""What a run needs on each GPU, from a backbone's config alone: arithmetic for what is kept, a rehearsal for the rest.

The sum of both is an upper bound: what is largest at the optimiser's step (DeepSpeed's gradients in fp32) and what is largest in the
backward pass are added up.

Not modelled: CUDA's context and libraries (0.5 to 1 GiB), NCCL's and cuBLAS's buffers, fragmentation of the allocator, what a kernel
of another attention than SDPA's or eager's takes, images (a frozen vision encoder keeps nothing for the backward pass, and when it
runs little else is there) and the projector behind them, the self-test of the first batch, evaluation, loading and saving.
"""
