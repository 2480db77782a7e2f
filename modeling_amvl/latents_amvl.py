"""The variational parts: heads that read latents off hidden states, the reparameterised sample, the projection back.

Shapes: B batch, K latent slots, Z latent size, D model size.
"""

import math

import torch
from torch import nn


def upcast(tensor):
    """fp32 from a half-precision tensor; any other as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class GaussianHead(nn.Module):
    """
    Reads a diagonal Gaussian off each hidden state.

    Args:
        hidden_size (`int`): D.
        latent_size (`int`): Z.
        min_log_variance (`float`), max_log_variance (`float`): bounds of the log-variance, approached smoothly so that
            the gradient never dies at a bound.
    """

    def __init__(self, hidden_size, latent_size, min_log_variance, max_log_variance):
        super().__init__()
        self.min_log_variance = min_log_variance
        self.max_log_variance = max_log_variance
        self.norm = nn.LayerNorm(hidden_size)
        self.mean = nn.Linear(hidden_size, latent_size)
        self.log_variance = nn.Linear(hidden_size, latent_size)

    def forward(self, hidden):  # (B, K, D)
        """Returns mean and log-variance, each `(B, K, Z)` and fp32, or finer where the model is."""
        normed = self.norm(hidden.to(self.mean.weight.dtype))  # (B, K, D)
        mean, log_variance = upcast(self.mean(normed)), upcast(self.log_variance(normed))  # (B, K, Z)
        log_variance = self.max_log_variance - nn.functional.softplus(self.max_log_variance - log_variance)
        log_variance = self.min_log_variance + nn.functional.softplus(log_variance - self.min_log_variance)
        return mean, log_variance

    @torch.no_grad()
    def reset(self, log_variance, generator=None):
        """Starts with means of unit variance, in directions at right angles, and every log-variance at the given value."""
        self.norm.reset_parameters()
        # On the CPU, so that every machine draws the same, and in fp32: half precision has no QR.
        drawn = torch.empty(self.mean.weight.shape)
        gain = max(1.0, self.mean.out_features / self.mean.in_features) ** 0.5
        self.mean.weight.copy_(nn.init.orthogonal_(drawn, gain=gain, generator=generator))
        std = 0.1 * self.log_variance.in_features**-0.5
        self.log_variance.weight.copy_(nn.init.normal_(drawn, std=std, generator=generator))
        nn.init.zeros_(self.mean.bias)
        nn.init.constant_(self.log_variance.bias, log_variance)


@torch.no_grad()
def reset_projection(projection, mean, embedding_norm, log_variance):
    """
    Starts `projection` (Z to D) as the way back of a head's `mean` (D to Z), so that a latent enters as what it was read off.

    Scaled so that a fresh latent of that log-variance enters with `embedding_norm`.
    """
    gain = max(1.0, mean.out_features / mean.in_features)  # squared, see GaussianHead.reset
    energy = gain * (gain + math.exp(log_variance)) * min(mean.in_features, mean.out_features)
    projection.weight.copy_(mean.weight.T * embedding_norm / math.sqrt(energy))
    nn.init.zeros_(projection.bias)


def sample_latents(mean, log_variance, temperature=1.0, generator=None, noise=None):
    """
    Reparameterised sample `mean + temperature * std * noise`.

    Args:
        mean (`torch.Tensor`), log_variance (`torch.Tensor`): `(B, K, Z)`.
        temperature (`float`, defaults to 1.0): 0 returns the mean and draws nothing.
        generator (`torch.Generator`, *optional*): source of the noise, on its own device.
        noise (`torch.Tensor`, *optional*): `(B, K, Z)` standard normal noise to use instead of drawing it.

    Returns:
        `torch.Tensor`: `(B, K, Z)`, differentiable in `mean` and `log_variance`.
    """
    if temperature == 0:
        return mean
    if noise is None:
        noise = draw_noise(mean, mean.shape[0], generator)
    return mean + temperature * torch.exp(0.5 * log_variance) * noise


def draw_noise(like, num_rows, generator=None):
    """Standard normal noise `(num_rows, K, Z)` with the type and on the device of `like` `(*, K, Z)`."""
    device = like.device if generator is None else generator.device
    shape = (num_rows, *like.shape[1:])
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
