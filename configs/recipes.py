"""Settings that the experiments of the paper share: those of the SDEs and of the networks.

Several fields belong to an SDE or a network; each function of this module sets all of them.

- Song et al., "Score-based generative modeling through stochastic differential equations",
  https://arxiv.org/abs/2011.13456
- Ho et al., "Denoising diffusion probabilistic models", https://arxiv.org/abs/2006.11239
- Song and Ermon, "Generative modeling by estimating gradients of the data distribution" (NCSN),
  https://arxiv.org/abs/1907.05600
- Song and Ermon, "Improved techniques for training score-based generative models" (NCSNv2),
  https://arxiv.org/abs/2006.09011
"""

import ml_collections


def ve(config: ml_collections.ConfigDict) -> None:
  """The VE SDE: network outputs divided by sigma, images in [0, 1], PC samplers."""
  config.training.sde = 'vesde'
  config.training.reduce_mean = False
  config.sampling.predictor = 'reverse_diffusion'
  config.sampling.corrector = 'langevin'
  config.data.centered = False
  config.model.scale_by_sigma = True
  config.model.embedding_type = 'fourier'
  config.model.ema_rate = 0.999


def vp(config: ml_collections.ConfigDict) -> None:
  """The VP SDE: noise prediction, images in [-1, 1], Euler-Maruyama sampling."""
  config.training.sde = 'vpsde'
  config.training.reduce_mean = True
  config.sampling.predictor = 'euler_maruyama'
  config.sampling.corrector = 'none'
  config.data.centered = True
  config.model.scale_by_sigma = False
  config.model.embedding_type = 'positional'
  config.model.ema_rate = 0.9999


def subvp(config: ml_collections.ConfigDict) -> None:
  """The sub-VP SDE, with the other settings of the VP SDE."""
  vp(config)
  config.training.sde = 'subvpsde'


def ncsnpp(config: ml_collections.ConfigDict) -> None:
  """NCSN++: BigGAN blocks, FIR resampling, residual input pyramid."""
  model = config.model
  model.name = 'ncsnpp'
  model.normalization = 'GroupNorm'
  model.nonlinearity = 'swish'
  model.nf = 128
  model.ch_mult = (1, 2, 2, 2)
  model.num_res_blocks = 4
  model.attn_resolutions = (16,)
  model.resamp_with_conv = True
  model.conditional = True
  model.fir = True
  model.fir_kernel = (1, 3, 3, 1)
  model.skip_rescale = True
  model.resblock_type = 'biggan'
  model.progressive = 'none'
  model.progressive_input = 'residual'
  model.progressive_combine = 'sum'
  model.init_scale = 0.0
  model.fourier_scale = 16.0


def ddpmpp(config: ml_collections.ConfigDict) -> None:
  """DDPM++: NCSN++ without FIR resampling and without the input pyramid."""
  ncsnpp(config)
  config.model.fir = False
  config.model.progressive_input = 'none'


def deep(config: ml_collections.ConfigDict) -> None:
  """The deep variants: twice the residual blocks, fewer iterations."""
  config.model.num_res_blocks = 8
  config.training.n_iters = 950001
  config.eval.end_ckpt = 19


def ncsnpp_256(config: ml_collections.ConfigDict) -> None:
  """NCSN++ for 256 pixels: seven resolutions, image pyramids at the input and at the output."""
  ncsnpp(config)
  model = config.model
  model.ch_mult = (1, 1, 2, 2, 2, 2, 2)
  model.num_res_blocks = 2
  model.progressive = 'output_skip'
  model.progressive_input = 'input_skip'


def ncsnpp_1024(config: ml_collections.ConfigDict) -> None:
  """NCSN++ for 1024 pixels: eight resolutions and few channels."""
  ncsnpp_256(config)
  model = config.model
  model.nf = 16
  model.ch_mult = (1, 2, 4, 8, 16, 32, 32, 32)
  model.num_res_blocks = 1
  model.ema_rate = 0.9999


def ddpm(config: ml_collections.ConfigDict) -> None:
  """The network of DDPM (Ho et al.) for 32 pixels."""
  model = config.model
  model.name = 'ddpm'
  model.nonlinearity = 'swish'
  model.nf = 128
  model.ch_mult = (1, 2, 2, 2)
  model.num_res_blocks = 2
  model.attn_resolutions = (16,)
  model.resamp_with_conv = True
  model.conditional = True


def ddpm_256(config: ml_collections.ConfigDict) -> None:
  """The network of DDPM for 256 pixels, where it needs a lower learning rate."""
  ddpm(config)
  config.model.ch_mult = (1, 1, 2, 2, 4, 4)
  config.model.num_scales = 1000
  config.optim.lr = 2e-5


def discrete(config: ml_collections.ConfigDict) -> None:
  """Training on the discrete noise levels: the objective of SMLD (Eq. 1) for VE, of DDPM for VP."""
  config.training.continuous = False
  config.model.embedding_type = 'positional'


def ncsn(config: ml_collections.ConfigDict) -> None:
  """NCSN: ten noise levels, annealed Langevin dynamics, no EMA.

  A Langevin step has size 2 snr^2 sigma^2; with this `snr` that is 2e-5 sigma^2 / 0.01^2, the
  published one.
  """
  ve(config)
  discrete(config)
  config.sampling.predictor = 'none'
  config.sampling.corrector = 'ald'
  config.sampling.n_steps_each = 100
  config.sampling.snr = 0.316

  model = config.model
  model.name = 'ncsn'
  model.normalization = 'InstanceNorm++'
  model.nonlinearity = 'elu'
  model.nf = 128
  model.scale_by_sigma = False
  model.sigma_max = 1.0
  model.num_scales = 10
  model.num_classes = 10
  model.ema_rate = 0.0

  config.optim.lr = 1e-3
  config.optim.warmup = 0
  config.optim.grad_clip = -1.0


def more_levels(
  config: ml_collections.ConfigDict, sigma_max: float, num_scales: int, snr: float
) -> None:
  """Techniques 1, 2 and 4 of NCSNv2: the largest noise level, their number, and the step size."""
  config.model.sigma_max = sigma_max
  config.model.num_scales = num_scales
  config.sampling.n_steps_each = 5
  config.sampling.snr = snr


def ncsnv2(config: ml_collections.ConfigDict) -> None:
  """NCSNv2 for 32 pixels, with all five techniques.

  Technique 3 divides the output of the network by sigma, technique 5 is the EMA of the parameters.
  """
  ncsn(config)
  more_levels(config, sigma_max=50.0, num_scales=232, snr=0.176)
  config.model.name = 'ncsnv2_64'
  config.model.scale_by_sigma = True
  config.model.ema_rate = 0.999
  config.optim.lr = 1e-4


def laptop(config: ml_collections.ConfigDict) -> None:
  """A network and a schedule that two CPU cores train in ten minutes."""
  training = config.training
  training.batch_size = 32
  training.n_iters = 2000
  training.snapshot_freq = 1000
  training.snapshot_freq_for_preemption = 100
  training.log_freq = 10
  training.eval_freq = 50
  training.n_jitted_steps = 5

  model = config.model
  model.nf = 16
  model.ch_mult = (1, 2, 4)
  model.num_res_blocks = 1
  model.attn_resolutions = (7,)
  model.dropout = 0.0
  model.num_scales = 250
  model.ema_rate = 0.998

  config.optim.lr = 2e-3
  config.optim.warmup = 50

  config.eval.begin_ckpt = 1
  config.eval.end_ckpt = 2
  config.eval.batch_size = 100
  config.eval.bpd_repeats = 1
