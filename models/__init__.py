"""Score networks; `models.utils` is the way in. Importing the package registers those below."""

from models import ddpm as ddpm
from models import ncsnpp as ncsnpp
