"""The faces of FFHQ and CelebA-HQ: TFRecord files of their authors' tools, or pictures."""

from absl import logging
from ml_collections import ConfigDict

from runtime.errors import UserError
from sources import own_pictures, tfrecords
from sources.base import Source, register_dataset
from sources.framing import Framing


@register_dataset(name='FFHQ')
@register_dataset(name='CelebAHQ')
def faces(
  config: ConfigDict,
  split: str,
  *,
  path: str = '',
  tfrecords_path: str = '',
  crop: str = 'center',
  resize: str = 'bilinear',
  background: str = 'white',
  min_side: int = 0,
  test_list: str = '',
  test_fraction: float = 0.1,
  num_classes: int = 0,
) -> Source:
  """Faces of `data.image_size` pixels.

  With `data.tfrecords_path`, a TFRecord file or the folder of `<name>-r<log2 size>.tfrecords`, both
  splits are all records of one file, as in the paper's code. With `data.path`, a folder or ZIP file
  of pictures, the other keys are those of the data set 'ImageFolder'.

  Raises:
    UserError: if both paths are empty, or there are no usable files.
  """
  data = config.data
  if not (tfrecords_path or path):
    raise UserError(
      f"data.tfrecords_path='' and data.path='' are empty, but {data.dataset} cannot be downloaded "
      f'by a program: set the first to its TFRecord files, or the second to a folder of pictures.'
    )
  records = tfrecords.find(tfrecords_path or path, data.image_size)
  if records:
    logging.info('Training and testing use the same images, all records of %s.', records)
    return tfrecords.open_records(data, records)
  if tfrecords_path:
    raise UserError(
      f'data.tfrecords_path={tfrecords_path!r} is neither a TFRecord file nor a folder of such '
      f'files: give one, or set data.path to a folder of pictures.'
    )
  framing = Framing(data.image_size, crop=crop, resize=resize, min_side=min_side)
  return own_pictures.from_path(
    data,
    split,
    path,
    framing=framing,
    background=background,
    test_list=test_list,
    test_fraction=test_fraction,
    num_classes=num_classes,
  )
