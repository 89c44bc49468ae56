"""Networks whose channels are nothing but filters of known values."""

import torch
from torch import nn


class Filters(nn.Module):
    """Convolutions side by side, each with a group of its own; the layers behind them are zero and score nothing.

    Args:
        sizes: of each convolution its filters, and the channels that they look at.
        kernel: height and width of the filters.
    """

    def __init__(self, sizes, kernel=3):
        super().__init__()
        self.channels = [channels for _, channels in sizes]
        self.convs = nn.ModuleList(nn.Conv2d(channels, count, kernel, bias=False) for count, channels in sizes)
        self.heads = nn.ModuleList(nn.Linear(count, 2, bias=False) for count, _ in sizes)
        with torch.no_grad():
            for conv, head in zip(self.convs, self.heads, strict=True):
                conv.weight.normal_()
                head.weight.zero_()

    def forward(self, x):
        parts = [
            head(conv(x[:, :channels]).flatten(2).mean(2))
            for conv, head, channels in zip(self.convs, self.heads, self.channels, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def example(self):
        return torch.randn(1, max(self.channels), *self.convs[0].kernel_size)


class OneWidth(nn.Module):
    """Attention whose code divides the width of its input by the heads, so that both widths are cut alike."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.embed = nn.Linear(4, 16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return self.head(x.mean(1))
