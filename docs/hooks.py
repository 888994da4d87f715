"""What the site needs beyond MkDocs: files outside docs/, and formulas without JavaScript.

MkDocs calls the functions of this module by their names, see `hooks` in mkdocs.yml.
"""

import os
import pathlib
import posixpath
import re

from latex2mathml import converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

# [text](../path) or ![text](../path#anchor) of a page, which leads out of its folder.
_OUTWARD = re.compile(r'\]\((\.\./[^)#\s]+)')
# What the extension pymdownx.arithmatex makes of $...$ and $$...$$.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

_TAG = re.compile(r'\\tag\{(.*?)\}')


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the files outside docs/ that pages link to, such as pictures, and the changelog."""
  root = pathlib.Path(config.config_file_path).parent
  found = {'../CHANGELOG.md'}
  for page in files.documentation_pages():
    for target in _OUTWARD.findall(page.content_string):
      uri = posixpath.normpath(posixpath.join(posixpath.dirname(page.src_uri), target))
      if uri.startswith('../'):
        found.add(uri)
  for uri in sorted(found):
    path = root / uri.removeprefix('../')
    if path.is_file():  # else MkDocs complains about the link
      files.append(_outside(uri, path, config))
  return files


def _outside(uri: str, path: pathlib.Path, config: MkDocsConfig) -> File:
  """The file at `path`, for links to `uri`, which begins with '../'."""
  # Said explicitly, because by default what begins with a dot is left out.
  file = File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED)
  inside = File(uri.removeprefix('../'), None, config.site_dir, config.use_directory_urls)
  file.dest_uri, file.url = inside.dest_uri, inside.url
  file.abs_dest_path = os.path.join(config.site_dir, file.dest_uri)
  return file


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
  """Replaces formulas in TeX by MathML, which browsers show by themselves."""
  return _FORMULA.sub(_mathml, html)


def _mathml(formula: re.Match) -> str:
  tex = formula[2].replace('&lt;', '<').replace('&gt;', '>').replace('&amp;', '&').strip()
  # Else single letters become italic, and functions touch their arguments.
  tex = tex.replace(r'\mathrm{', r'\text{').replace(r'\log ', r'\log\,')
  number = _TAG.search(tex)
  display = 'block' if formula[1] == 'div' else 'inline'
  math = converter.convert(_TAG.sub('', tex), display=display)
  if number:
    return f'<div class="numbered">{math}<span>({number[1]})</span></div>'
  return math
