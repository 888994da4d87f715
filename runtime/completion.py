"""Scripts with which a shell completes the flags of `main.py`, their values and `--config.` keys.

The flags and their values are written into the script. The keys depend on the configuration file:
`main.py --completion=keys --config=FILE` prints them, and the script asks for them once per file.
"""

import re
import string
import textwrap
from collections.abc import Sequence

from absl import flags

# $$ stands for a dollar sign of the shell. Bash splits words at '=' and ':', so the word before the
# cursor is read from the line, and what comes before its last '=' is left out of the answers.
_BASH = """
_score_sde_keys() {
  local word program file
  for word in $$COMP_LINE; do
    case $$word in
      *main.py) program=$$word ;;
      --config=*) file=$${word#--config=} ;;
    esac
  done
  [[ $$file != "$$_score_sde_file" ]] || return
  _score_sde_file=$$file
  _score_sde_known=$$("$$1" "$$program" --completion=keys --config="$$file" 2> /dev/null)
}

_score_sde() {
  local line=$${COMP_LINE:0:COMP_POINT} word
  word=$${line##* }
  COMPREPLY=()
  [[ $$line == *main.py\\ * ]] || return
  case $$word in
$cases
    --config=*|--workdir=*|--checkpoint=*)
      mapfile -t COMPREPLY < <(compgen -f -- "$${word#*=}")
      [[ -d $${COMPREPLY[0]} ]] && compopt -o nospace -o filenames
      return ;;
    --config.*=*) return ;;
    --config.*)
      _score_sde_keys "$$1"
      mapfile -t COMPREPLY < <(compgen -W "$$_score_sde_known" -- "$$word") ;;
    *)
      mapfile -t COMPREPLY < <(compgen -W '$names' -- "$$word") ;;
  esac
  [[ $${#COMPREPLY[@]} == 1 && $$COMPREPLY == *[=.] ]] && compopt -o nospace
}

complete -o default -F _score_sde python python3
"""
_BASH_CASE = """    --{name}=*)
      mapfile -t COMPREPLY < <(compgen -W '{values}' -- "${{word#*=}}")
      return ;;"""

_ZSH = """
_score_sde_keys() {
  local word program file
  for word in $$words; do
    case $$word in
      *main.py) program=$$word ;;
      --config=*) file=$${word#--config=} ;;
    esac
  done
  [[ -n $$file && $$file != $$_score_sde_file ]] || return
  _score_sde_file=$$file
  _score_sde_known=(
    $${(f)"$$($$words[1] $$program --completion=keys --config=$$file 2> /dev/null)"}
  )
}

_score_sde() {
  if [[ $$words[2] != *main.py || CURRENT -eq 2 ]]; then _default; return; fi
  case $$PREFIX in
$cases
    --config=*|--workdir=*|--checkpoint=*) compset -P '*='; _files ;;
    --config.*=*) ;;
    --config.*) _score_sde_keys; compadd -S '' -- $$_score_sde_known ;;
    *) compadd -S '' -- $names ;;
  esac
}

compdef _score_sde python python3
"""
_ZSH_CASE = """    --{name}=*) compset -P '*='; compadd -- {values} ;;"""

_FISH = """
function __score_sde
  string match -q -- '*main.py' (commandline -opc)
end

function __score_sde_keys
  set -l words (commandline -opc)
  set -l program (string match -- '*main.py' $$words)
  set -l file (string replace -rf -- '^--config=' '' $$words)
  if test -n "$$file" -a "$$file" != "$$__score_sde_file"
    set -g __score_sde_file $$file
    set -g __score_sde_known \\
      ($$words[1] $$program --completion=keys --config=$$file 2> /dev/null)
  end
  printf '%s\\n' $$__score_sde_known
end

for python in python python3
$cases
  complete -c $$python -f -a '(__score_sde_keys)' \\
    -n '__score_sde; and string match -q -- "--config.*" (commandline -ct)'
end
"""
_FISH_CASE = """  complete -c $python -n __score_sde -l {name} -{kind}{values} -d '{help}'"""

SCRIPTS = ('bash', 'zsh', 'fish')


def script(shell: str, known: Sequence[flags.Flag]) -> str:
  """The script for a shell, one of `SCRIPTS`, that completes the flags `known`."""
  return {'bash': _bash, 'zsh': _zsh, 'fish': _fish}[shell](known).strip()


def _values(flag: flags.Flag) -> list[str]:
  """The values that a flag may have, if it is known which."""
  return list(getattr(flag.parser, 'enum_values', None) or [])


def _names(known: Sequence[flags.Flag]) -> list[str]:
  names = [f'--{flag.name}' if flag.boolean else f'--{flag.name}=' for flag in known]
  return [*names, '--config.', '--help']


def _cases(known: Sequence[flags.Flag], case: str) -> str:
  limited = [flag for flag in known if _values(flag)]
  return '\n'.join(case.format(name=f.name, values=' '.join(_values(f))) for f in limited)


def _bash(known: Sequence[flags.Flag]) -> str:
  names, cases = ' '.join(_names(known)), _cases(known, _BASH_CASE)
  return string.Template(_BASH).substitute(cases=cases, names=names)


def _zsh(known: Sequence[flags.Flag]) -> str:
  names, cases = ' '.join(_names(known)), _cases(known, _ZSH_CASE)
  return string.Template(_ZSH).substitute(cases=cases, names=names)


def _fish(known: Sequence[flags.Flag]) -> str:
  lines = []
  for flag in known:
    values = f" -a '{' '.join(_values(flag))}'" if _values(flag) else ''
    kind = 'f' if flag.boolean else 'x' if values else 'r'
    text = re.sub('^<.*?>: |["\']', '', flag.help)
    text = textwrap.shorten(text, 60, placeholder=' ...')
    lines.append(_FISH_CASE.format(name=flag.name, kind=kind, values=values, help=text))
  return string.Template(_FISH).substitute(cases='\n'.join(lines))
