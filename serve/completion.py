"""Owns the scripts by which a shell completes `elenchus …`: tyro's, which knows commands and flags, and what it lacks.

For bash that is names of runs, TOML files, config keys and the shells themselves. The other shells get tyro's alone.
"""

from __future__ import annotations

from collections.abc import Sequence

_BASH = r"""
# Names of runs, TOML files and config keys, which the function above does not know.
_elenchus() {
  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}"
  local runs_dir=runs names="" path i num_words=0
  for ((i = 2; i < ${#COMP_WORDS[@]} - 1; i++)); do
    [[ "${COMP_WORDS[i]}" == --runs-dir ]] && runs_dir="${COMP_WORDS[i+1]}"
  done
  # Every flag of these commands has a value.
  for ((i = 2; i < COMP_CWORD; i++)); do
    if [[ "${COMP_WORDS[i]}" == -* ]]; then ((i++)); else ((num_words++)); fi
  done
  if ((COMP_CWORD >= 2 && num_words == 0)) && [[ "$word" != -* && "$before" != -* ]]; then
    case " @NAMED@ " in *" $command "*)
      for path in "$runs_dir"/*/resolved.json; do
        [[ -e "$path" ]] && path="${path%/resolved.json}" && names+="${path##*/} "
      done
      COMPREPLY=($(compgen -W "$names" -- "$word"))
      return;;
    esac
    if [[ "$command" == completion ]]; then
      COMPREPLY=($(compgen -W "@SHELLS@" -- "$word"))
      return
    fi
  fi
  if [[ "$word" != -* && "$before" != -* ]]; then
    case " @FILES@ " in *" $command "*)
      compopt -o filenames
      local IFS=$'\n'
      COMPREPLY=($(compgen -f -X '!*.toml' -- "$word") $(compgen -d -- "$word"))
      return;;
    esac
  fi
  _tyro_elenchus
  [[ ${#COMPREPLY[@]} -eq 1 && -z "${COMPREPLY[0]}" ]] && COMPREPLY=()
  if [[ "$word" == --* ]]; then
    case " @CONFIGURED@ " in *" $command "*) COMPREPLY+=($(compgen -W "@KEYS@" -- "$word"));; esac
  fi
}
complete -F _elenchus elenchus
"""


def completion_script(
    tyro_script: str,
    *,
    shell: str,
    named: Sequence[str],
    configured: Sequence[str],
    files: Sequence[str],
    shells: Sequence[str],
    keys: Sequence[str],
) -> str:
    """Return the script that a shell is to read.

    Args:
        tyro_script: what tyro wrote for this shell.
        shell: bash, zsh, fish.
        named: commands whose first word is a run's name.
        configured: commands that take config keys as flags.
        files: those of them that take TOML files.
        shells: what `elenchus completion` takes.
        keys: dotted config keys.
    """
    if shell != "bash":
        return tyro_script
    own = _BASH
    words = {"@NAMED@": named, "@CONFIGURED@": configured, "@FILES@": files, "@SHELLS@": shells}
    for mark, values in words.items():
        own = own.replace(mark, " ".join(values))
    return tyro_script + own.replace("@KEYS@", " ".join(f"--{key}" for key in keys))
