"""Makes `port_checkpoint*` with PyTorch: a real file of torch.save, and what its network computes.

Run by hand, in an environment of its own, with PyTorch (2.13 made the files that are here):
  python tests/golden/make_port_checkpoint.py
The network is a small NCSN++ with the module list of the PyTorch port; after two steps of Adam with
warm-up, clipping and EMA, all is saved in both formats. The recorded outputs are those of the
parameters, of their average, and of the parameters one step later, whose gradient is cos(7 w).
"""

import io
import lzma
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = pathlib.Path(__file__).parent
NF, EMA_RATE, LR, WARMUP, CLIP = 4, 0.999, 2e-4, 5000, 1.0


class GaussianFourierProjection(nn.Module):
  def __init__(self):
    super().__init__()
    self.W = nn.Parameter(torch.randn(NF), requires_grad=False)

  def forward(self, x):
    angles = x[:, None] * self.W[None] * 2 * np.pi
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class NIN(nn.Module):
  def __init__(self, channels):
    super().__init__()
    self.W = nn.Parameter(torch.zeros(channels, channels))
    self.b = nn.Parameter(torch.zeros(channels))

  def forward(self, x):
    return torch.einsum('bihw,io->bohw', x, self.W) + self.b[:, None, None]


def norm(channels):
  return nn.GroupNorm(channels // 4, channels, eps=1e-6)


def conv(inputs, outputs, size=3):
  return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class Block(nn.Module):
  def __init__(self, inputs, outputs, resample=None):
    super().__init__()
    self.GroupNorm_0 = norm(inputs)
    self.Conv_0 = conv(inputs, outputs)
    self.Dense_0 = nn.Linear(4 * NF, outputs)
    self.GroupNorm_1 = norm(outputs)
    self.Conv_1 = conv(outputs, outputs)
    if inputs != outputs or resample:
      self.Conv_2 = conv(inputs, outputs, 1)
    self.resample = resample or (lambda x: x)

  def forward(self, x, temb):
    h = self.Conv_0(self.resample(F.silu(self.GroupNorm_0(x))))
    h = h + self.Dense_0(F.silu(temb))[:, :, None, None]
    h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
    x = self.resample(x)
    x = self.Conv_2(x) if hasattr(self, 'Conv_2') else x
    return (x + h) / 2**0.5


class Attention(nn.Module):
  def __init__(self, channels):
    super().__init__()
    self.GroupNorm_0 = norm(channels)
    self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels) for _ in range(4))

  def forward(self, x):
    h = self.GroupNorm_0(x)
    q, k, v = (nin(h).flatten(2) for nin in (self.NIN_0, self.NIN_1, self.NIN_2))
    weights = torch.softmax(torch.einsum('bci,bcj->bij', q, k) * x.shape[1] ** -0.5, dim=-1)
    h = torch.einsum('bij,bcj->bci', weights, v).reshape(x.shape)
    return (x + self.NIN_3(h)) / 2**0.5


def double(x):
  return F.interpolate(x, scale_factor=2, mode='nearest')


def halve(x):
  return F.avg_pool2d(x, 2)


class Network(nn.Module):
  """One residual block at each of two resolutions; attention at the lower one."""

  def __init__(self):
    super().__init__()
    self.register_buffer('sigmas', torch.linspace(50, 0.01, 10))
    low, high = NF, 2 * NF
    self.all_modules = nn.ModuleList(
      [
        GaussianFourierProjection(),
        nn.Linear(2 * NF, 4 * NF),
        nn.Linear(4 * NF, 4 * NF),
        conv(1, low),
        Block(low, low),
        Block(low, low, halve),
        Block(low, high),
        Attention(high),
        Block(high, high),
        Attention(high),
        Block(high, high),
        Block(high + high, high),
        Block(high + low, high),
        Attention(high),
        Block(high, high, double),
        Block(high + low, low),
        Block(low + low, low),
        norm(low),
        conv(low, 1),
      ]
    )

  def forward(self, x, sigma):
    m = self.all_modules
    temb = m[2](F.silu(m[1](m[0](sigma.log()))))
    hs = [m[3](2 * x - 1)]
    hs.append(m[4](hs[-1], temb))
    hs.append(m[5](hs[-1], temb))
    hs.append(m[7](m[6](hs[-1], temb)))
    h = m[10](m[9](m[8](hs[-1], temb)), temb)
    for block in (m[11], m[12]):
      h = block(torch.cat([h, hs.pop()], dim=1), temb)
    h = m[14](m[13](h), temb)
    for block in (m[15], m[16]):
      h = block(torch.cat([h, hs.pop()], dim=1), temb)
    return m[18](F.silu(m[17](h))) / sigma[:, None, None, None]


class Average:
  def __init__(self, parameters):
    self.shadow_params = [p.detach().clone() for p in parameters if p.requires_grad]
    self.num_updates = 0

  def update(self, parameters):
    self.num_updates += 1
    decay = min(EMA_RATE, (1 + self.num_updates) / (10 + self.num_updates))
    trained = [p for p in parameters if p.requires_grad]
    for average, p in zip(self.shadow_params, trained, strict=True):
      average.sub_((1 - decay) * (average - p.detach()))

  def state_dict(self):
    numbers = {'decay': EMA_RATE, 'num_updates': self.num_updates}
    return {**numbers, 'shadow_params': self.shadow_params}


def main():
  torch.manual_seed(0)
  model = nn.DataParallel(Network())
  for p in model.parameters():  # few distinct values, so that the files compress
    p.data = torch.randint(-4, 5, p.shape) / 8 + (1.0 if p.ndim == 1 else 0.0)
  optimizer = torch.optim.Adam(model.parameters(), lr=LR, eps=1e-8)
  average = Average(model.parameters())
  gradients = [torch.randint(-1, 2, p.shape).float() for p in model.parameters()]

  def step(number, gradients):
    for p, g in zip(model.parameters(), gradients, strict=True):
      p.grad = g.clone() if p.requires_grad else None  # clipping changes it
    for group in optimizer.param_groups:
      group['lr'] = LR * np.minimum(number / WARMUP, 1.0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    average.update(model.parameters())

  step(10000, gradients)
  step(10001, [g / 2 for g in gradients])
  state = {
    'optimizer': optimizer.state_dict(),
    'model': model.state_dict(),
    'ema': average.state_dict(),
    'step': 10002,
  }
  for name, zipped in (('port_checkpoint', True), ('port_checkpoint_legacy', False)):
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    data = lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    (HERE / f'{name}.pth.xz').write_bytes(data)

  x, sigma = torch.rand(2, 1, 8, 8), torch.tensor([0.5, 20.0])
  values = {'x': x.permute(0, 2, 3, 1), 'labels': sigma}

  def output():
    with torch.no_grad():
      return model(x, sigma).permute(0, 2, 3, 1)

  values['y'] = output()
  now = [p.detach().clone() for p in model.parameters()]
  trained = [p for p in model.parameters() if p.requires_grad]
  for p, value in zip(trained, average.shadow_params, strict=True):
    p.data = value.clone()
  values['y_ema'] = output()
  for p, value in zip(model.parameters(), now, strict=True):
    p.data = value
  step(10002, [torch.cos(7 * p.detach()) for p in model.parameters()])
  values['y_next'] = output()
  np.savez_compressed(
    HERE / 'port_checkpoint.npz', **{key: value.numpy() for key, value in values.items()}
  )


if __name__ == '__main__':
  main()
