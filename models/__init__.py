"""Networks. `models.utils` creates them by name; importing this package registers those below."""

from models import ddpm as ddpm
from models import ncsnpp as ncsnpp
from models import ncsnv2 as ncsnv2
from models import wideresnet_noise_conditional as wideresnet_noise_conditional
