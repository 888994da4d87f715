"""Every common key of a configuration, with its default, which applies where a file omits it."""

import ml_collections


def get_default_configs() -> ml_collections.ConfigDict:
  """The configuration of all defaults."""
  config = ml_collections.ConfigDict()
  config.seed = 42

  config.training = training = ml_collections.ConfigDict()
  training.sde = 'vpsde'
  training.batch_size = 128  # over all devices
  training.grad_accum_steps = (
    1  # parts of the batch, in turn, for batches that do not fit in memory
  )
  training.n_iters = 1300001
  training.snapshot_freq = 50000  # steps between the checkpoints that are kept
  training.snapshot_freq_for_preemption = 10000  # steps between the states that a run resumes from
  # Which of the kept checkpoints stay: 'all', 'last:N', or 'every:N', each N-th and the newest.
  training.keep_checkpoints = 'all'
  training.snapshot_sampling = True  # draw samples with every kept checkpoint
  training.log_freq = 50
  training.eval_freq = 100
  training.n_jitted_steps = 5  # steps in one compiled call; must divide the four frequencies
  training.continuous = True
  training.likelihood_weighting = False
  training.reduce_mean = False  # per-pixel mean of the loss; else half the sum
  # What to do if the loss or the gradient is NaN or infinite: 'stop', or 'skip' the update.
  training.on_nonfinite = 'stop'
  training.max_skipped_steps = 10  # in a row; one more stops the training
  training.debug_nans = False  # find the first operation and layer that is not finite; slow

  config.parallel = parallel = ml_collections.ConfigDict()
  parallel.fsdp = 1  # devices over which parameters, their average and the optimizer are split
  parallel.spatial = 1  # devices over which the height of an image is split

  config.sampling = sampling = ml_collections.ConfigDict()
  sampling.method = 'pc'  # or 'ode', 'heun', 'ddim', 'dpm_solver++'
  sampling.predictor = 'euler_maruyama'
  sampling.corrector = 'none'
  # Updates of every sampler except 'ode', which adapts; with noise_removal the last is denoising.
  sampling.n_steps = 0  # 0: model.num_scales
  sampling.time_grid = 'edm'  # of the few-step samplers: 'edm', 'logsnr' or 'uniform'
  sampling.rho = 7.0  # exponent of the grid 'edm'
  sampling.eta = 0.0  # new noise in ddim and dpm_solver++, from 0 (the flow) to 1 (the SDE)
  sampling.churn = 0.0  # noise that heun adds and removes again
  sampling.n_steps_each = 1  # corrector steps before each predictor step
  sampling.noise_removal = True  # return the mean of the last step
  sampling.probability_flow = False
  sampling.snr = 0.16  # signal-to-noise ratio of the corrector
  sampling.ode_solver = 'RK45'  # of method='ode'; or RK23, DOP853, a solver of diffrax
  sampling.rtol = 1e-5  # of method='ode'
  sampling.atol = 1e-5
  sampling.per_image_seeds = False  # each image from its own key, whatever the batch size
  sampling.task = 'unconditional'  # of --mode=sample; or inpaint, colorize, superres, class
  sampling.num_samples = 64  # of --mode=sample
  sampling.batch_size = 64  # of --mode=sample
  # The part that task='inpaint' draws: right, left, bottom, top, center, random.
  sampling.mask = 'right'
  sampling.superres_factor = 4  # side of the blocks of task='superres'
  sampling.label = -1  # class of task='class'; -1 draws all classes in turn
  sampling.guidance_scale = 1.0  # of task='class'
  sampling.trajectory_every = 0  # steps between the frames of a GIF; 0 writes no GIF

  config.likelihood = likelihood = ml_collections.ConfigDict()
  likelihood.hutchinson_type = 'Rademacher'  # or 'Gaussian', 'exact'
  likelihood.num_probes = 1  # how many probes are averaged
  likelihood.ode_solver = 'RK45'
  likelihood.rtol = 1e-5
  likelihood.atol = 1e-5
  likelihood.eps = 1e-5  # time t at which the integration starts, from the data

  config.eval = evaluate = ml_collections.ConfigDict()
  evaluate.begin_ckpt = 9
  evaluate.end_ckpt = 26
  evaluate.batch_size = 1024
  evaluate.enable_sampling = False
  evaluate.num_samples = 50000
  evaluate.enable_loss = True
  evaluate.enable_bpd = False
  evaluate.bpd_dataset = 'test'
  evaluate.bpd_repeats = 0  # passes, each with other noise; 0: 5 for 'test', 1 for 'train'
  evaluate.wait_seconds = 0  # how long to wait for a checkpoint that training has yet to save
  evaluate.extractor = 'inception'  # or 'inception_ttur', 'mnist5k'; 'none': draw samples only
  evaluate.inception_path = ''  # weights; else SCORE_SDE_INCEPTION, else assets/
  evaluate.stats_path = ''  # statistics of the data; else a file of assets/stats/
  evaluate.stats_split = 'train'
  evaluate.stats_features = True  # keep the features, for KID, precision and recall
  # How many training images sigma_max is measured on, at most 1 GiB: a random sample of a larger
  # data set; 0 skips it.
  evaluate.sigma_max_images = 100000

  config.data = data = ml_collections.ConfigDict()
  data.dataset = 'CIFAR10'
  data.image_size = 32
  data.num_channels = 3
  data.random_flip = True
  data.centered = False  # scale images to [-1, 1] instead of [0, 1]
  data.uniform_dequantization = False
  data.path = ''  # the folder or file of the data, where the data set is not in the repository
  data.cache_dir = ''  # folder of prepared data and downloads; else ~/.cache/score_sde/data
  data.num_workers = 0  # threads that prepare data (0: one for each core) and read batches (0: one)
  data.on_device = False  # keep the training images on the devices
  data.max_bad = 100  # pictures that may be skipped because they cannot be used

  config.model = model = ml_collections.ConfigDict()
  model.name = 'ncsnpp'
  model.sigma_min = 0.01
  model.sigma_max = 50.0
  model.num_scales = 1000
  model.beta_min = 0.1
  model.beta_max = 20.0
  model.dropout = 0.1
  model.embedding_type = 'fourier'
  model.ema_rate = 0.9999
  # Of float32 products on accelerators: 'default' (TF32 on GPUs, bfloat16 on TPUs), 'bfloat16',
  # 'tensorfloat32' or 'float32'. A CPU always multiplies in float32.
  model.matmul_precision = 'default'
  # Of NCSN++, DDPM++ and DDPM.
  model.dtype = 'float32'  # of activations; or 'bfloat16'
  model.remat = False  # compute activations again for the gradient instead of keeping them
  model.remat_policy = 'nothing'  # what is kept even so; or 'products'

  config.optim = optim = ml_collections.ConfigDict()
  optim.optimizer = 'Adam'
  optim.lr = 2e-4
  optim.beta1 = 0.9
  optim.eps = 1e-8
  optim.weight_decay = 0.0
  optim.warmup = 5000  # steps of linear warm-up
  optim.grad_clip = 1.0  # largest global norm of the gradient; negative turns clipping off

  # The noise-conditional classifier: --mode=train_classifier, class-conditional sampling.
  # Frequencies, seed, beta1, eps and grad_clip are those of `training` and `optim`.
  config.classifier = classifier = ml_collections.ConfigDict()
  classifier.checkpoint = ''  # a classifier.safetensors, for sampling
  classifier.name = 'wideresnet_noise_conditional'
  classifier.num_classes = 10
  classifier.blocks_per_group = 4
  classifier.channel_multiplier = 10
  classifier.embedding_size = 128
  classifier.fourier_scale = 16.0
  classifier.sigma_min = 0.01  # the noise levels, in units of images in [0, 1]
  classifier.sigma_max = 80.0
  classifier.batch_size = 128  # over all devices
  classifier.n_iters = 200000
  classifier.lr = 2e-4
  classifier.warmup = 5000  # steps of linear warm-up
  classifier.weight_decay = 0.0  # of the kernels
  classifier.ema_rate = 0.999
  return config
